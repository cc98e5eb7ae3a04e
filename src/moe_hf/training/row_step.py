"""A step of `FactoredAdam` from rows, whose cost depends only on the experts that had tokens.

The moments of an idle expert decay when the expert has tokens again; its weights decay when they are read again.

Shape suffixes: E experts, H rows and D columns of an expert's matrix, G experts of a group, M moments of a factor.
"""

import math
from functools import cache

import torch
from torch import nn

from ..models.factored_gradients import RowGradients, local
from ..models.measured_choice import kept_choice, largest_faster
from ..models.native_experts import ROWS_TRIED, ROWS_UNMEASURED, Visited, has_kernels, num_measured


def step_rows(param: nn.Parameter, rows: RowGradients, state: dict, group: dict, limit: int | None = None) -> None:
    """Make one step of the formulas of `FactoredAdam`, in place, without the gradient left' right.

    The factored second moments follow from the Gram matrices of the rows. Each factor of the denominator has a
    separate eps, so the update is a product of scaled rows: lr (left / (a + eps))' (right / (b + eps)).

    Args:
        param: (E, H, D).
        rows: the gradient of `param`.
        state: the state at this step: step, row (E, H), col (E, D), and visited (E,) int64, the last step at which
            each expert had tokens.
        group: the hyperparameters.
        limit: the largest number of rows of an expert for the compiled kernels; None: as measured.
    """
    step, beta2 = state["step"], group["betas"][1]
    decay = idle_decay(param, group["lr"] * group["weight_decay"])
    if limit is None:
        limit = _limit(rows) if param.dtype == rows.left.dtype and param.is_contiguous() else 0
    if limit:
        visited = Visited(rows.counts, limit)
        gap = (step - state["visited"][visited.experts]).to(param.dtype)
        keep = torch.ones_like(gap) if decay is None else decay.take(visited.experts).to(param.dtype)
        factors = (param, rows.left, rows.right, state["row"], state["col"], beta2**gap, keep)
        correction = 1 - beta2**step
        visited.step(*factors, beta2=beta2, bias_correction=correction, lr=float(group["lr"]), eps=group["eps"])
        state["visited"][visited.experts] = step
    visited = (rows.counts > limit).nonzero()[:, 0]
    decay_V1 = (beta2 ** (step - state["visited"][visited]).to(state["row"].dtype))[:, None]
    for name in ("row", "col"):
        state[name][visited] = state[name][visited] * decay_V1
    state["visited"][visited] = step
    for experts, left_GrH, right_GrD in rows.groups(above=limit):
        row, col = state["row"][experts], state["col"][experts]
        squares_GH, squares_GD = _mean_squares(left_GrH, right_GrD)
        row += (1 - beta2) * squares_GH.to(row.dtype)
        col += (1 - beta2) * squares_GD.to(col.dtype)
        state["row"][experts], state["col"][experts] = row, col
        mean_G1 = row.mean(dim=-1, keepdim=True).clamp_(min=torch.finfo(row.dtype).tiny)
        a_GH = (row / mean_G1).sqrt_().add_(group["eps"])
        b_GD = (col / (1 - beta2**step)).sqrt_().add_(group["eps"])
        if decay is not None:
            decay.settle(param, experts)
        update = torch.bmm((left_GrH / a_GH[:, None]).mT, right_GrD / b_GD[:, None])
        param.index_add_(0, experts, update.to(param.dtype), alpha=-group["lr"])


def _limit(rows: RowGradients) -> int:
    sizes = rows.left.shape[1], rows.right.shape[1]
    return measured_limit(*sizes) if has_kernels(rows.left.dtype, rows.left.device, *sizes) else 0


@cache
def measured_limit(num_left: int, num_right: int) -> int:
    """Return the number of rows up to which the kernels are faster for this shape, measured once on each machine."""
    name = f"few_rows_step-{num_left}-{num_right}"
    return kept_choice(name, lambda: _measure_limit(num_left, num_right), ROWS_UNMEASURED)


def _measure_limit(num_left: int, num_right: int) -> int:
    number = num_measured(num_left, num_right)
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def ways(count: int):
        left, right = torch.ones(number * count, num_left), torch.ones(number * count, num_right)
        rows = RowGradients(left, right, torch.full((number,), count))
        state = {"step": 1, "visited": torch.zeros(number, dtype=torch.int64)}
        state |= {"row": torch.ones(number, num_left), "col": torch.ones(number, num_right)}
        inputs = (torch.ones(number, num_left, num_right), rows, state, group)
        return (lambda: step_rows(*inputs, limit=count)), (lambda: step_rows(*inputs, limit=0))

    return largest_faster(ROWS_TRIED, ways)


def _mean_squares(left_GrH: torch.Tensor, right_GrD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of the squares of left' right over the columns (G, H) and over the rows (G, D).

    With K = right right', sum_j (left' right)_ij^2 = sum_r left_ri (K left)_ri. This is less work than the full
    product unless there are many rows. float64 is needed, because terms that cancel in the gradient must cancel in its
    squares.
    """
    left, right = left_GrH.double(), right_GrD.double()
    if left.shape[1] * (left.shape[2] + right.shape[2]) > left.shape[2] * right.shape[2]:
        squares = torch.bmm(left.mT, right).square_()
        return squares.mean(-1), squares.mean(-2)
    by_left, by_right = torch.bmm(right, right.mT), torch.bmm(left, left.mT)
    squares_GH = (torch.bmm(by_left, left) * left).sum(1).clamp_(min=0) / right.shape[2]
    squares_GD = (torch.bmm(by_right, right) * right).sum(1).clamp_(min=0) / left.shape[2]
    return squares_GH, squares_GD


def settle_moments(state: dict, beta2: float, is_done: bool = False) -> None:
    """Apply the decay of idle experts' moments that dense steps would have applied.

    Args:
        state: the state of a parameter; `visited` is removed.
        beta2: as in the formulas.
        is_done: whether the decay includes the step `state["step"]`, or ends at the step before.
    """
    if "visited" in state:
        last = state["step"] if is_done else state["step"] - 1
        gap = (last - local(state.pop("visited")))[:, None].to(state["row"].dtype)
        for name in ("row", "col"):
            local(state[name]).mul_(beta2**gap)


class IdleDecay:
    """The weight decay that is still to be applied to experts without tokens.

    Attributes:
        log_total: the sum over all steps of log(1 - lr weight_decay).
        log_applied: (E,) float64, the part of log_total that was applied to each expert.
    """

    def __init__(self, param: nn.Parameter):
        self.log_total = 0.0
        self.log_applied = torch.zeros(param.shape[0], dtype=torch.float64, device=param.device)

    @torch.no_grad()
    def settle(self, param: nn.Parameter, experts: torch.Tensor | None = None) -> None:
        """Apply the outstanding decay to these experts, or to all."""
        if experts is None:
            experts = torch.arange(len(self.log_applied), device=param.device)
        experts = experts[self.log_applied[experts] != self.log_total]
        for expert, factor in zip(experts.tolist(), self.take(experts).tolist()):
            param[expert].mul_(factor)

    def take(self, experts: torch.Tensor) -> torch.Tensor:
        """Return the outstanding factors of these experts' weights, and mark the factors as applied."""
        factors = (self.log_total - self.log_applied[experts]).exp_()
        self.log_applied[experts] = self.log_total
        return factors


def idle_decay(param: nn.Parameter, decay: float) -> IdleDecay | None:
    """Add a step's decay, lr weight_decay, to the outstanding decay of a parameter; None if there never was any."""
    pending = getattr(param, "idle_decay", None)
    if pending is None and decay:
        pending = param.idle_decay = IdleDecay(param)
    if pending is not None:
        pending.log_total += math.log1p(-decay) if decay < 1 else -math.inf
    return pending
