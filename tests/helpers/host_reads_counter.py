"""Counts what a GPU would make the host wait for, on a CPU.

A read is a value or a copy that the host takes of a tensor, or an operation whose output's size depends on values.
Tensors that are on the CPU on purpose are left out, by the file that reads them.
"""

import collections
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The cache counts its tokens in a CPU tensor, an optimizer its steps; cuDNN's lengths are read before.
ON_PURPOSE = ("moe_hf/models/cache.py", "moe_hf/models/cudnn_lstm.py", "torch/optim/")
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "unique_consecutive", "_unique2", "unique_dim", "equal"}


class _SizedByValues(TorchDispatchMode):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        is_mask = is_mask and any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_mask or name in SIZED_BY_VALUES:
            self.count(name)
        return func(*args, **(kwargs or {}))


def _reader() -> str:
    """The file of the models, the Trainer or the library on whose behalf a tensor is read."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if any(part in name for part in (*ON_PURPOSE, "moe_hf/", "/transformers/", "/accelerate/")):
            return name
        frame = frame.f_back
    return "torch"


@contextmanager
def counted_host_reads() -> Iterator[collections.Counter]:
    """Yields {(kind, place in the code): how often}, places as "folder/file.py"."""
    reads, is_inside = collections.Counter(), [False]

    def count(kind):
        place = _reader()
        if not is_inside[0] and not any(part in place for part in ON_PURPOSE):
            reads[kind, "/".join(place.split("/")[-2:])] += 1

    def counting(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            if not getattr(self, "was_read", False):
                count(name)
            outer, is_inside[0] = is_inside[0], True
            try:
                result = original(self, *args, **kwargs)
            finally:
                is_inside[0] = outer
            if name == "cpu":
                result.was_read = True  # its values are free from now on
            return result

        return method

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(name)))
        stack.enter_context(_SizedByValues(count))
        yield reads
