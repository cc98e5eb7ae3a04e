"""Products of float32 tensors in full precision, where all others may be computed in TF32."""

from contextlib import AbstractContextManager, nullcontext

import torch


class _FullPrecision:
    def __enter__(self):
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    def __exit__(self, *_):
        torch.backends.cuda.matmul.fp32_precision = self.before


def full_float32(device: torch.device) -> AbstractContextManager:
    """Within it, matrix products on a GPU are IEEE float32, whatever TF32 setting the run has made.

    TF32 has 10 bits of mantissa: a gate would choose other experts for a token whose logits are close. The gradients
    of these products are computed outside, and may be TF32. A graph of torch.compile keeps the setting of the run.

    Args:
        device: where the products are computed; on any but a GPU nothing changes.
    """
    is_affected = device.type == "cuda" and not torch.compiler.is_compiling()
    if is_affected and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _FullPrecision()
    return nullcontext()
