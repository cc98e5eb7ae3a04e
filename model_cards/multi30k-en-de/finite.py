"""Checks that weights are finite before they are saved."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


class NonFiniteWeightsError(ValueError):
    """Weights hold NaN or infinity, and were not saved. The message is one line that names a tensor."""


def first_non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None if all tensors are finite.

    The function reads each tensor once and does not allocate memory. It reads only this process's part of a sharded
    tensor. Integers and quantized weights are always finite.

    Args:
        tensors: (name, tensor) pairs. Tensors on the meta device do not have values and are skipped.
    """
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
            continue
        if tensor.element_size() == 1:  # torch cannot compute the minimum of float8
            tensor = tensor.float()
        # aminmax returns NaN if any value is NaN.
        if not all(value.isfinite() for value in tensor.detach().aminmax()):
            return name
    return None
