"""The product of few rows with a large weight on a CPU, computed as (W x')' if that is faster than x W'.

Decoding multiplies one row per text or beam with the softmax's weight, which is too large for any cache. Libraries may
read the weight once per row for x W', but once for all rows for W x'.
"""

import torch
from torch import nn

from .measured_choice import kept_choice, largest_faster
from .quantization import linear

ROWS_TRIED = (2, 4, 8)
# A smaller weight may fit into a cache, where x W' is the faster product.
MIN_WEIGHT_SIZE = 2**20
# The measurement reads at most this part of a weight.
_MEASURED_SIZE = 2**24

_limits: dict[tuple, int] = {}


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute `quantization.linear` without a bias, up to rounding: x (..., K), weight (N, K) -> (..., N).

    Few float32 rows without a gradient are computed in the layout that is faster on this machine. Compiled and
    exported graphs keep the plain product, because they must work for any number of rows.
    """
    if not _may_transpose(x, weight) or len(rows := x.reshape(-1, x.shape[-1])) > _rows_transposed(weight):
        return linear(x, weight)
    return _transposed_product(rows, weight).view(*x.shape[:-1], len(weight))


def _transposed_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight, rows.t()).t().contiguous()


def _may_transpose(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the layout may be chosen; the cheapest and most selective conditions come first."""
    return (
        type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and 2 * x.shape[-1] <= x.numel() <= ROWS_TRIED[-1] * x.shape[-1]
        and weight.numel() >= MIN_WEIGHT_SIZE
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def _rows_transposed(weight: torch.Tensor) -> int:
    """Return the largest number of rows for which (W x')' is faster with a weight of this shape."""
    part = weight[: max(1, _MEASURED_SIZE // weight.shape[1])]
    key = (*part.shape, torch.get_num_threads())
    if key not in _limits:
        name = "few_rows_linear-{}-{}-{}threads".format(*key)
        _limits[key] = kept_choice(name, lambda: _measure(part), unmeasured=0)
    return _limits[key]


def _measure(weight: torch.Tensor) -> int:
    def ways(num_rows: int):
        rows = weight.new_ones(num_rows, weight.shape[1])
        return lambda: _transposed_product(rows, weight), lambda: nn.functional.linear(rows, weight)

    return largest_faster(ROWS_TRIED, ways)
