"""A step of `FactoredAdam` from full gradients, in pieces that stay in a CPU's cache between the passes.

Shape suffixes: E experts (any number of leading dimensions), H rows and D columns of an expert's matrix.
"""

import math
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor, Replicate

from ..models.native_experts import call_kernel, library

# Plain torch steps a parameter in pieces of this size, so that temporary tensors are no larger.
CHUNK_BYTES = {"cpu": 2**21}
LARGE_CHUNK_BYTES = 2**28


def step_dense(param: torch.Tensor, grad: torch.Tensor, state: dict, group: dict) -> None:
    """Make one step by the formulas of `FactoredAdam`, in place.

    Args:
        param: (..., H, D).
        grad: (..., H, D).
        state: the state at this step: step, row (..., H), col (..., D).
        group: the hyperparameters.

    Raises:
        ValueError: the matrices of a DTensor are split between processes.
    """
    beta2 = group["betas"][1]
    rates = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    options = dict(
        beta2=beta2, bias_correction=1 - beta2 ** state["step"], **rates
    )  # in the order of the kernel's arguments
    tensors = _local_parts(param.detach(), grad, state["row"], state["col"])
    if _fits_kernel(*tensors):
        call_kernel(
            "dense_step", math.prod(tensors[0].shape[:-2]), *tensors[0].shape[-2:], *tensors, *options.values()
        )
        return
    scratch = None
    for *pieces, num_rows in _chunks(*tensors):
        if scratch is None:  # the first piece is the largest one
            scratch = torch.empty_like(pieces[1].narrow(-2, 0, num_rows), dtype=state["row"].dtype)
        _update(*pieces, num_rows, scratch, **options)


def _local_parts(param: torch.Tensor, grad: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return this process's parts of sharded tensors. Its matrices are complete, so no communication is needed."""
    if not isinstance(param, DTensor):
        return param, grad, *factors
    leading = range(param.dim() - 2)
    if not all(isinstance(place, Replicate) or getattr(place, "dim", None) in leading for place in param.placements):
        raise ValueError(
            f"factored=True needs complete matrices on each process: a parameter of shape {tuple(param.shape)} "
            f"must be sharded along its leading dimensions only, not by {param.placements}"
        )
    grad = grad.redistribute(placements=param.placements)
    return tuple(tensor.to_local() for tensor in (param, grad, *factors))


def _fits_kernel(param: torch.Tensor, *others: torch.Tensor) -> bool:
    tensors = (param, *others)
    if param.device.type != "cpu" or param.shape[-1] % 8 or not param.numel():
        return False
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return False
    return hasattr(library(), "dense_step")


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple]:
    """Yield views of (param, grad, row, col), each (E, H, D), (E, H) or (E, D), and the number of rows at once."""
    param, _, row, _ = tensors
    if param.dim() == 2:
        yield from _chunks(*(tensor.unsqueeze(0) for tensor in tensors))
    elif param.dim() > 3:
        for parts in zip(*(tensor.unbind(0) for tensor in tensors)):
            yield from _chunks(*parts)
    else:
        num_rows = CHUNK_BYTES.get(param.device.type, LARGE_CHUNK_BYTES) // (param.shape[-1] * row.element_size())
        num_matrices = max(1, num_rows // param.shape[-2])
        for parts in zip(*(tensor.split(num_matrices) for tensor in tensors)):
            yield *parts, max(1, min(num_rows, param.shape[-2]))


def _update(
    param: torch.Tensor,
    grad: torch.Tensor,
    row_EH: torch.Tensor,
    col_ED: torch.Tensor,
    num_rows: int,
    scratch: torch.Tensor,
    *,
    beta2: float,
    bias_correction: float,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Apply the formulas of `FactoredAdam` in place, to `num_rows` rows of each matrix at a time."""
    row_sums, col_sum_ED = [], torch.zeros_like(col_ED)
    for piece in grad.split(num_rows, dim=-2):
        squares = _product(piece, piece, scratch)
        row_sums.append(squares.sum(dim=-1))
        col_sum_ED += squares.sum(dim=-2)
    row_EH.lerp_(torch.cat(row_sums, dim=-1) / grad.shape[-1], 1 - beta2)
    col_ED.lerp_(col_sum_ED / grad.shape[-2], 1 - beta2)

    # The mean is zero for an expert that never had a token. Multiplying the factors' inverses avoids a division and a
    # root per element, and the product R_i C_j, which could underflow.
    mean_E1 = row_EH.mean(dim=-1, keepdim=True).clamp_(min=torch.finfo(row_EH.dtype).tiny)
    inverse_a_EH1 = (row_EH / mean_E1).sqrt_().add_(eps).reciprocal_().unsqueeze(-1)
    inverse_b_E1D = (col_ED / bias_correction).sqrt_().add_(eps).reciprocal_().unsqueeze(-2)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    for target, piece, factor in zip(*(tensor.split(num_rows, dim=-2) for tensor in (param, grad, inverse_a_EH1))):
        target.addcmul_(_product(piece, factor, scratch), inverse_b_E1D, value=-lr)


def _product(piece: torch.Tensor, factor: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return the product of both in the dtype of `scratch`, a buffer of the largest piece's size."""
    out = scratch if scratch.shape == piece.shape else scratch[: piece.shape[0], : piece.shape[1]]
    return torch.mul(piece.to(scratch.dtype), factor.to(scratch.dtype), out=out)
