"""The optimizer of appendix D: Adam with beta1 = 0 and factored second moments for the experts, Adam for the rest.

Shape suffixes: E experts (any number of leading dimensions), H rows and D columns of an expert's matrix.
"""

import logging

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from transformers import TrainerCallback

from ..models.experts import MoeExperts
from ..models.factored_gradients import clear_row_gradients, local, merge_rows, row_gradients, settle_weights
from .dense_step import step_dense
from .row_step import settle_moments, step_rows

logger = logging.getLogger(__name__)

FACTORED_ADAM = "factored_adam"


class FactoredAdam(torch.optim.Optimizer):
    r"""AdamW with factored second moments and without first moments in groups with `factored=True` (appendix D).

    For every matrix g (H, D) of a gradient's last two dimensions, at step t:

        R_i = beta2 R_i + (1 - beta2) mean_j g_ij^2        C_j = beta2 C_j + (1 - beta2) mean_i g_ij^2
        a_i = sqrt(R_i / mean_i R_i)    b_j = sqrt(C_j / (1 - beta2^t))    p_ij -= lr g_ij / ((a_i + eps) (b_j + eps))

    after the decoupled weight decay p_ij *= 1 - lr weight_decay. (a_i b_j)^2 is appendix D's estimate of E[g_ij^2].
    Each factor has a separate eps, so that the denominator stays a product. If each g^2 has rank one, the step equals
    that of AdamW with betas = (0, beta2), except for eps. An expert without tokens (g = 0) changes only by weight
    decay, and its moments decay. If g^2 has rank one, the first step after a long idle time is at most lr / sqrt(1 -
    beta2).

    R and C are float32 for any parameter dtype, except that float64 parameters have float64. Relative to the
    parameters, R and C have the size 1 / H + 1 / D, which is under 1 % for matrices larger than 200 x 200.

    The Adafactor optimizers of torch and Transformers differ from this one. In both, beta2 is 1 - t^decay_rate, and no
    decay_rate gives Adam's constant with bias correction. torch's version also scales lr by the parameter's RMS and
    caps it by 1 / sqrt(t). Transformers' version has another eps.

    Args:
        params (Iterable): parameters or parameter groups. Leading dimensions may be sharded.
        lr: as in AdamW.
        betas: as in AdamW; a factored group uses only the second one.
        eps: as in AdamW, and at least 1e-38, so that its inverse is a float32 number. A factored group adds eps to
            a_i, whose mean square is 1, and to b_j.
        weight_decay: as in AdamW.
        factored: default for groups without their own value; for stacked matrices (..., H, D).

    Raises:
        ValueError: a value is out of range, or a factored parameter has fewer than two dimensions.
    """

    # `use_factored_gradients` checks this attribute and refuses other optimizers.
    reads_row_gradients = True

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        factored: bool = False,
    ):
        # torch reads `fused` when it loads a state: with it, Adam's step counters stay on the device.
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, factored=factored, fused=True)
        super().__init__(params, defaults)

    @classmethod
    def for_model(cls, model: nn.Module, lr: float = 1e-3, *, weight_decay: float = 0.0, **options) -> "FactoredAdam":
        """Return an optimizer of all parameters that need a gradient, factored for the experts.

        Args:
            model: a model with `MoeExperts`.
            lr: as in AdamW.
            weight_decay: weight decay of matrices; vectors, such as biases, do not decay.
            **options (Any): betas and eps.
        """
        matrices = {name for name, param in model.named_parameters() if param.dim() > 1}
        return cls(_parameter_groups(model, weight_decay, matrices), lr=lr, **options)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            if group[name] < 0:
                raise ValueError(f"{name}={group[name]} must not be negative")
        if not group["eps"] >= 1e-38:  # an expert without tokens gets the update 0 / eps / eps
            raise ValueError(f"eps={group['eps']} must be at least 1e-38")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']} must be at least 0 and below 1")
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"] if group["factored"] else ():
            if param.dim() < 2:
                raise ValueError(f"factored=True needs matrices (..., H, D), not the shape {tuple(param.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"] if group["factored"] else ():
                if row_gradients(param):
                    self._row_step(param, group)
            params = [param for param in group["params"] if param.grad is not None]
            if group["factored"]:
                for param in params:
                    self._factored_step(param, group)
            elif params:
                self._adam_step(params, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                clear_row_gradients(param)

    def _factored_state(self, param: nn.Parameter) -> dict:
        state = self.state[param]
        if not state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["step"] = 0
            state["row"] = torch.zeros_like(param.select(-1, 0), dtype=dtype)
            state["col"] = torch.zeros_like(param.select(-2, 0), dtype=dtype)
        state["step"] += 1
        return state

    def _row_step(self, param: nn.Parameter, group: dict) -> None:
        """Make the same step as `_factored_step`, from the rows of `use_factored_gradients`."""
        if param.grad is not None:
            raise RuntimeError("experts have both a gradient and rows: clear them when use_factored_gradients changes")
        state = self._factored_state(param)
        rows = merge_rows(row_gradients(param))
        clear_row_gradients(param)
        if "visited" not in state:  # the steps so far were dense, and updated every moment
            state["visited"] = torch.full_like(state["row"].select(-1, 0), state["step"] - 1, dtype=torch.int64)
        if isinstance(param, DTensor) and group["weight_decay"]:
            # FSDP copies all weights before it is known which experts get tokens, so the decay cannot be postponed.
            local(param).mul_(1 - group["lr"] * group["weight_decay"])
            group = group | {"weight_decay": 0.0}
        step_rows(local(param), rows, {name: local(value) for name, value in state.items()}, group)

    def settle_moments(self) -> None:
        """Bring the moments of idle experts up to date, so that the state consists of row and col only."""
        for group in self.param_groups:
            for param in group["params"] if group["factored"] else ():
                settle_moments(self.state.get(param, {}), group["betas"][1], is_done=True)

    def _factored_step(self, param: nn.Parameter, group: dict) -> None:
        state = self._factored_state(param)
        settle_weights(param)
        settle_moments(state, group["betas"][1])
        step_dense(param, param.grad, state, group)

    def _adam_step(self, params: list[nn.Parameter], group: dict) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        states = [self.state[param] for param in params]
        adamw(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def state_dict(self) -> dict:
        for group in self.param_groups:
            for param in group["params"]:
                settle_weights(param)  # no saved state has the postponed decay
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype, but the factors of a bfloat16 parameter must stay float32.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params):
            for name in ("row", "col", "visited"):
                factor = state_dict["state"].get(key, {}).get(name)
                if factor is not None:
                    self.state[param][name] = factor.to(param.device)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of every `MoeExperts` in the model."""
    experts = [module for module in model.modules() if isinstance(module, MoeExperts)]
    return [param for module in experts for param in module.parameters(recurse=False)]


def create_factored_adam(model: nn.Module, args, decay_parameters: list[str]) -> FactoredAdam:
    """Return a `FactoredAdam` that is factored for the model's experts.

    Args:
        model: a model with `MoeExperts`.
        args (TrainingArguments): has learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay.
        decay_parameters: names of the parameters with weight decay.
    """
    return FactoredAdam(
        _parameter_groups(model, args.weight_decay, set(decay_parameters)),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def _parameter_groups(model: nn.Module, weight_decay: float, decayed: set[str]) -> list[dict]:
    experts, groups = set(expert_parameters(model)), {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups.setdefault((param in experts, name in decayed), []).append(param)
    return [
        {"params": params, "factored": factored, "weight_decay": weight_decay if decays else 0.0}
        for (factored, decays), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def state_bytes(optimizer: torch.optim.Optimizer, params) -> int:
    """Return the size in bytes of an optimizer's state for these parameters, after its first step."""
    values = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class OptimizerSizeCallback(TrainerCallback):
    """Logs the size of any optimizer's state after the first step."""

    def __init__(self):
        self.done = False

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.done or not state.is_world_process_zero:
            return
        self.done = True
        experts = expert_parameters(model)
        rest = set(model.parameters()).difference(experts)
        for name, params in (("experts", experts), ("rest", rest)):
            size, own = state_bytes(optimizer, params), sum(param.nbytes for param in params)
            if own:
                share = f"{100 * size / own:.2f} % of the parameters' bytes"
                logger.info(f"optimizer state, {name}: {size / 1e6:.2f} MB, {share}")
