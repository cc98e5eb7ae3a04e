"""Clipping by the exact global norm, of gradients and of the rows that stand for the experts' gradients."""

import math

import torch
from torch import nn

from ..models.factored_gradients import RowGradients, merge_rows, row_gradients


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients of a model so that their global norm is at most `max_norm`.

    Unlike torch's function it sees the experts of `use_factored_gradients`. Their part is exact without a gradient:
    |left' right|^2 = sum(left left' * right right'), summed in float64.

    Args:
        model: after the backward pass.
        max_norm: of all gradients together; math.inf measures the norm alone.

    Returns:
        The norm before clipping, a float64 scalar.

    Raises:
        ValueError: `max_norm` is negative or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm} must be at least 0")
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    rows = [part for parameter in parameters for part in summed_rows(parameter)]
    squares = [nn.utils.get_total_norm(gradients).double().square()] if gradients else []
    squares += [part.squared_norm() for part in rows]
    norm = sum(squares).sqrt() if squares else torch.zeros((), dtype=torch.float64)
    if math.isfinite(max_norm):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor in (*gradients, *(part.left for part in rows)):
            tensor.mul_(factor.to(tensor.device, tensor.dtype))
    return norm


def summed_rows(parameter: nn.Parameter) -> list[RowGradients]:
    """The rows of a parameter as one gradient, [] without any: the norm of a sum is not the sum of norms."""
    if len(parts := row_gradients(parameter)) > 1:
        parameter.row_gradients = parts = [merge_rows(parts)]
    return parts
