"""Clips gradients by the exact global norm, including experts whose gradients are stored as rows."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..models.factored_gradients import RowGradients, local, merge_rows, row_gradients


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients of a model so that their global norm is at most `max_norm`.

    Unlike torch's function, this one includes the experts of `use_factored_gradients`. Their norm is exact without the
    full gradient: |left' right|^2 = sum(left left' * right right'), summed in float64. For sharded parameters, the
    norm is over all processes, and all of them must call this function.

    Args:
        model: the model, after the backward pass.
        max_norm: maximal norm of all gradients together; math.inf only measures the norm.

    Returns:
        The norm before clipping, a float64 scalar.

    Raises:
        ValueError: `max_norm` is negative or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm} must be at least 0")
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    rows = [(parameter, part) for parameter in parameters for part in summed_rows(parameter)]
    squares = [_whole(nn.utils.get_total_norm(part)).double().square() for part in _by_mesh(gradients)]
    squares += [_sum_over_shards(part.squared_norm(), parameter) for parameter, part in rows]
    norm = sum(squares).sqrt() if squares else torch.zeros((), dtype=torch.float64)
    if math.isfinite(max_norm):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor in (*map(local, gradients), *(part.left for _, part in rows)):
            tensor.mul_(factor.to(tensor.device, tensor.dtype))
    return norm


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _by_mesh(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group gradients by their mesh of processes: experts have another mesh, and torch computes a norm over one."""
    parts = defaultdict(list)
    for gradient in gradients:
        parts[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    return list(parts.values())


def _sum_over_shards(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return the sum over the processes that have different parts of a parameter."""
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                dist.all_reduce(value, group=parameter.device_mesh.get_group(dim))
    return value


def summed_rows(parameter: nn.Parameter) -> list[RowGradients]:
    """Return a parameter's rows merged into one gradient, or []: the norm of a sum is not the sum of norms."""
    if len(parts := row_gradients(parameter)) > 1:
        parameter.row_gradients = parts = [merge_rows(parts)]
    return parts
