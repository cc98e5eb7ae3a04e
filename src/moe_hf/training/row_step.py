"""A step of `FactoredAdam` from rows: the cost follows the experts that had tokens, whatever the number of the others.

An idle expert's moments decay when it has tokens again, its weights when they are read again.

Shape suffixes: E experts, H rows and D columns of an expert's matrix, G experts of a group, M moments of a factor.
"""

import math

import torch
from torch import nn

from ..models.factored_gradients import RowGradients


def step_rows(param: nn.Parameter, rows: RowGradients, state: dict, group: dict) -> None:
    """Make one step of the formulas of `FactoredAdam`, in place.

    Args:
        param: (E, H, D).
        rows: its gradient.
        state: of this step: step, row (E, H), col (E, D), and after the first step from rows visited (E,), the last
            step at which an expert had tokens.
        group: the hyperparameters.
    """
    step, beta2 = state["step"], group["betas"][1]
    if "visited" not in state:  # so far the steps were dense, and moved every moment
        state["visited"] = torch.full((param.shape[0],), step - 1, device=param.device)
    decay = idle_decay(param, group["lr"] * group["weight_decay"])
    limit = rows.limit if param.dtype == rows.left.dtype and param.is_contiguous() else 0
    if limit:
        visited = rows.for_kernels()
        gap = (step - state["visited"][visited.experts]).to(param.dtype)
        keep = torch.ones_like(gap) if decay is None else decay.take(visited.experts).to(param.dtype)
        factors = (param, rows.left, rows.right, state["row"], state["col"], beta2**gap, keep)
        correction = 1 - beta2**step
        visited.step(*factors, beta2=beta2, bias_correction=correction, lr=float(group["lr"]), eps=group["eps"])
        state["visited"][visited.experts] = step
    for experts, left_GrH, right_GrD in rows.groups(above=limit):
        grad = torch.bmm(left_GrH.mT, right_GrD).to(state["row"].dtype)
        scratch = grad.square()
        gap = (step - state["visited"][experts])[:, None].to(grad.dtype)
        row = _moments(state["row"], experts, scratch.mean(dim=-1), beta2, gap)
        col = _moments(state["col"], experts, scratch.mean(dim=-2), beta2, gap)
        mean_G1 = row.mean(dim=-1, keepdim=True).clamp_(min=torch.finfo(row.dtype).tiny)
        a_GH1 = (row / mean_G1).sqrt_().unsqueeze(-1)
        b_G1D = (col / (1 - beta2**step)).sqrt_().unsqueeze(-2)
        torch.mul(a_GH1, b_G1D, out=scratch).add_(group["eps"])
        if decay is not None:
            decay.settle(param, experts)
        param.index_add_(0, experts, grad.div_(scratch).to(param.dtype), alpha=-group["lr"])
        state["visited"][experts] = step


def _moments(moments_EM, experts, means_GM, beta2: float, gap_G1) -> torch.Tensor:
    """R = beta2^gap R + (1 - beta2) means, kept and returned (G, M)."""
    updated = moments_EM[experts].mul_(beta2**gap_G1).add_(means_GM, alpha=1 - beta2)
    moments_EM[experts] = updated
    return updated


def settle_moments(state: dict, beta2: float) -> None:
    """Let idle experts' moments decay up to the step before `state["step"]`, as a dense step does it at once."""
    if "visited" in state:
        gap = (state["step"] - 1 - state.pop("visited"))[:, None].to(state["row"].dtype)
        for name in ("row", "col"):
            state[name].mul_(beta2**gap)


class IdleDecay:
    """The weight decay that experts without tokens still have to get.

    Attributes:
        log_total: the sum over all steps of log(1 - lr weight_decay).
        log_applied: (E,) float64, what each expert has got of it.
    """

    def __init__(self, param: nn.Parameter):
        self.log_total = 0.0
        self.log_applied = torch.zeros(param.shape[0], dtype=torch.float64, device=param.device)

    @torch.no_grad()
    def settle(self, param: nn.Parameter, experts: torch.Tensor | None = None) -> None:
        """Give these experts, or all, what they have not got."""
        if experts is None:
            experts = torch.arange(len(self.log_applied), device=param.device)
        experts = experts[self.log_applied[experts] != self.log_total]
        for expert, factor in zip(experts.tolist(), self.take(experts).tolist()):
            param[expert].mul_(factor)

    def take(self, experts: torch.Tensor) -> torch.Tensor:
        """The factors that these experts' weights are still to be multiplied by; from now on they have got them."""
        factors = (self.log_total - self.log_applied[experts]).exp_()
        self.log_applied[experts] = self.log_total
        return factors


def idle_decay(param: nn.Parameter, decay: float) -> IdleDecay | None:
    """Add a step's decay, lr weight_decay, to what the experts of a parameter get; None if there never was any."""
    pending = getattr(param, "idle_decay", None)
    if pending is None and decay:
        pending = param.idle_decay = IdleDecay(param)
    if pending is not None:
        pending.log_total += math.log1p(-decay) if decay < 1 else -math.inf
    return pending
