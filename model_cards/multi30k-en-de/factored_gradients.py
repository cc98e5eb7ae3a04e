"""Stores the experts' gradients as factors, so that a gradient of the experts' full size is never created.

An expert with r rows has a gradient of rank r. For a matrix (M, N) of the expert, it is G = left' right, with left (r,
M) and right (r, N):

- `up_proj`: left is the gradient at the hidden units, and right is the inputs.
- `down_proj`: left is the weighted gradient at the outputs, and right is the hidden units.

The backward pass computes all four anyway. `FactoredAdam` reads them instead of `.grad`, which stays None.

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size, R rows, M x N a matrix.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .measured_choice import kept_choice, largest_faster
from .native_experts import ROWS_TRIED, ROWS_UNMEASURED, Visited, has_kernels, num_measured

SWITCH = "use_factored_gradients"
# Memory of a group of experts with equal numbers of rows, so that the group stays in the cache.
GROUP_BYTES = {"cpu": 2**19}
LARGE_GROUP_BYTES = 2**28


class RowGradients(NamedTuple):
    """The gradient of stacked matrices (E, M, N): expert e has the gradient left_e' right_e, over its rows.

    Attributes:
        left: (R, M), rows sorted by expert.
        right: (R, N), rows in the same order.
        counts: (E,) int64, the number of rows of each expert.
    """

    left: torch.Tensor
    right: torch.Tensor
    counts: torch.Tensor

    @property
    def limit(self) -> int:
        """Return the largest number of rows of an expert whose norm the compiled kernels compute."""
        sizes = self.left.shape[1], self.right.shape[1]
        return _measured_limit(*sizes) if has_kernels(self.left.dtype, self.left.device, *sizes) else 0

    def groups(self, above: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield groups of experts with equal numbers of rows: ids (G,), left (G, r, M) and right (G, r, N).

        Args:
            above: skips experts with this number of rows or fewer.
        """
        if not (self.counts > above).any():
            return
        matrix_bytes = self.left.shape[1] * self.right.shape[1] * self.left.element_size()
        size = max(1, GROUP_BYTES.get(self.left.device.type, LARGE_GROUP_BYTES) // matrix_bytes)
        expert_R = torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)
        order = self.counts[expert_R].argsort(stable=True)  # by count, then by expert
        left, right = self.left.index_select(0, order), self.right.index_select(0, order)
        start = 0
        for count, number in zip(*(values.tolist() for values in self.counts.unique(return_counts=True))):
            here, start = slice(start, start + count * number), start + count * number
            if count > above:
                shape = (number, count, -1)
                experts = (self.counts == count).nonzero()[:, 0]
                yield from zip(
                    *(part.split(size) for part in (experts, left[here].view(shape), right[here].view(shape)))
                )

    def squared_norm(self) -> torch.Tensor:
        """Return the sum of all squared elements (float64): |left' right|^2 = sum(left left' * right right')."""
        total = torch.zeros((), dtype=torch.float64, device=self.left.device)
        if self.limit:
            total += Visited(self.counts, self.limit).squared_norm(self.left, self.right)
        return total + self.squared_norm_by_products(above=self.limit)

    def squared_norm_by_products(self, above: int = 0) -> torch.Tensor:
        """Return the same sum in plain torch, over the experts with more than `above` rows."""
        total = torch.zeros((), dtype=torch.float64, device=self.left.device)
        for _, left, right in self.groups(above):
            if left.shape[1] <= min(left.shape[2], right.shape[2]):
                products = torch.bmm(left, left.mT) * torch.bmm(right, right.mT)
            else:
                products = torch.bmm(left.mT, right).square()
            total += products.sum(dtype=torch.float64)
        return total

    def dense(self) -> torch.Tensor:
        """Return the full gradient, (E, M, N)."""
        gradient = self.left.new_zeros(len(self.counts), self.left.shape[1], self.right.shape[1])
        for experts, left, right in self.groups():
            gradient[experts] = torch.bmm(left.mT, right)
        return gradient


@cache
def _measured_limit(num_left: int, num_right: int) -> int:
    name = f"few_rows_norm-{num_left}-{num_right}"
    return kept_choice(name, lambda: _measure_limit(num_left, num_right), ROWS_UNMEASURED)


def _measure_limit(num_left: int, num_right: int) -> int:
    num_experts = num_measured(num_left, num_right)

    def ways(count: int):
        left, right = torch.ones(num_experts * count, num_left), torch.ones(num_experts * count, num_right)
        rows = RowGradients(left, right, torch.full((num_experts,), count))
        visited = Visited(rows.counts, count)
        return lambda: visited.squared_norm(left, right), rows.squared_norm_by_products

    return largest_faster(ROWS_TRIED, ways)


def merge_rows(parts: list[RowGradients]) -> RowGradients:
    """Return the sum of gradients of one parameter, as a gradient with all their rows."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.counts for part in parts]
    experts = torch.arange(len(counts[0]), device=counts[0].device)
    order = torch.cat([experts.repeat_interleave(count) for count in counts]).argsort(stable=True)
    left, right = (torch.cat([part[side] for part in parts]).index_select(0, order) for side in (0, 1))
    return RowGradients(left, right, sum(counts))


def row_gradients(parameter: nn.Parameter) -> list[RowGradients]:
    """Return the rows that backward passes have stored for a parameter since its last step or clearing."""
    return getattr(parameter, "row_gradients", [])


def clear_row_gradients(parameter: nn.Parameter) -> None:
    """Clear a parameter's rows, as `zero_grad` clears a gradient."""
    if row_gradients(parameter):
        parameter.row_gradients = []


def use_factored_gradients(model: nn.Module) -> Callable[[], None]:
    """Make the experts of a model store their gradients as factors, for `FactoredAdam`.

    `.grad` of the experts stays None. Clip with `moe_hf.clip_grad_norm_`, because torch's function ignores these
    experts.

    With expert parallelism, each process stores the rows of its own experts. A custom training loop also needs
    `gather_rows`.

    Args:
        model: any module with `MoeExperts` that have one hidden layer of ReLU units and the implementation "moe_hf"
            (the default on a CPU).

    Returns:
        A function that switches back to full gradients. It writes pending gradients to `.grad`, but drops those of
        sharded experts.

    Raises:
        ValueError: the model has no experts, or its experts are of another kind, or FSDP without expert parallelism
            has sharded them.
    """
    modules = [module for module in model.modules() if hasattr(module, "factored_gradients")]
    if not modules:
        raise ValueError(f"{SWITCH}: the model {type(model).__name__} has no MoeExperts")
    for module in modules:
        _check_experts(module)
    handles = [register_optimizer_step_pre_hook(_check_optimizer)]
    for module in modules:
        module.factored_gradients = True
        module.row_owners = dict(module.named_parameters(recurse=False))
        handles.append(module.register_forward_pre_hook(_settle_used))
        handles.append(module.register_state_dict_pre_hook(_settle_all))

    def use_dense_gradients() -> None:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.factored_gradients, module.row_owners = False, {}
            _settle_all(module)
            for parameter in module.parameters(recurse=False):
                for rows in row_gradients(parameter) if not is_sharded(parameter) else ():
                    dense = rows.dense().to(parameter.dtype)
                    parameter.grad = dense if parameter.grad is None else parameter.grad + dense
                clear_row_gradients(parameter)

    return use_dense_gradients


def settle_weights(parameter: nn.Parameter, experts: torch.Tensor | None = None) -> None:
    """Apply the weight decay that `FactoredAdam` postponed while experts were idle, to the given experts or to all."""
    if (decay := getattr(parameter, "idle_decay", None)) is not None:
        decay.settle(parameter, experts)


def _settle_used(module: nn.Module, args: tuple) -> None:
    top_k_index = args[1]
    for parameter in module.parameters(recurse=False):
        if getattr(parameter, "idle_decay", None) is not None:
            used = top_k_index.unique()
            settle_weights(parameter, used[used < parameter.shape[0]])


def _settle_all(module: nn.Module, *args) -> None:
    for parameter in module.parameters(recurse=False):
        settle_weights(parameter)


def _check_experts(module: nn.Module) -> None:
    implementation = module.config._experts_implementation
    if module.mid_proj is not None or not isinstance(module.act_fn, nn.ReLU):
        raise ValueError(f"{SWITCH}: experts must have one hidden layer of ReLU units (num_expert_layers=1)")
    if implementation != "moe_hf":
        raise ValueError(f"{SWITCH}: experts_implementation={implementation!r} makes dense gradients, use 'moe_hf'")
    for parameter in module.parameters(recurse=False):
        if is_sharded(parameter) and "ep" not in (parameter.device_mesh.mesh_dim_names or ()):
            raise ValueError(f"{SWITCH}: experts sharded by FSDP have dense gradients, use expert parallelism")


def is_sharded(parameter: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor, which is distributed over processes."""
    return hasattr(parameter, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; other tensors are returned unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_owners(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the optimizer's parameters, which store the rows of `up_proj` and `down_proj`.

    With expert parallelism, the library replaces the parameters with this process's tensors while the experts run.

    Raises:
        RuntimeError: an adapter has replaced a parameter, or a hook waits for a gradient that is never created.
    """
    owners = []
    for name in ("up_proj", "down_proj"):
        parameter = module.row_owners.get(name)
        if not is_sharded(parameter):
            parameter = getattr(module, name)
        if not isinstance(parameter, nn.Parameter):
            raise RuntimeError(
                f"{name} of the experts is not a parameter, probably because of an adapter: undo {SWITCH} first"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"a hook waits for the gradient of {name}, which {SWITCH} never creates: undo one of them"
            )
        owners.append(parameter)
    return tuple(owners)


def _check_optimizer(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Refuse an optimizer that does not read rows, before its step: it would not update these experts."""
    if getattr(optimizer, "reads_row_gradients", False):
        return
    if any(row_gradients(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise RuntimeError(
            f"{type(optimizer).__name__} cannot step experts with {SWITCH}: only FactoredAdam reads them"
        )


def will_be_accumulated(edge: tuple) -> bool:
    """Return whether this backward pass accumulates the gradient of the parameter at a node's edge.

    Raises:
        RuntimeError: `torch.autograd.grad` asks for that gradient.
    """
    try:
        return edge[0] is not None and torch._C._will_engine_execute_node(edge[0])
    except RuntimeError as error:
        raise RuntimeError(
            f"torch.autograd.grad asks for the gradient of experts, which {SWITCH} never creates: undo {SWITCH} first"
        ) from error
