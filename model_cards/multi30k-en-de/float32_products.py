"""Computes selected float32 products in full precision, while other products may use TF32."""

from contextlib import AbstractContextManager, nullcontext

import torch


class _FullPrecision:
    def __enter__(self):
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    def __exit__(self, *_):
        torch.backends.cuda.matmul.fp32_precision = self.before


def full_float32(device: torch.device) -> AbstractContextManager:
    """Return a context in which matrix products on a GPU are IEEE float32, regardless of the run's TF32 setting.

    TF32 has 10 bits of mantissa, so a gate would choose other experts for a token with close logits. Gradients of
    these products are computed outside the context and may use TF32. A graph of torch.compile keeps the run's setting.

    Args:
        device: the device of the products; only GPUs are affected.
    """
    is_affected = device.type == "cuda" and not torch.compiler.is_compiling()
    if is_affected and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _FullPrecision()
    return nullcontext()
