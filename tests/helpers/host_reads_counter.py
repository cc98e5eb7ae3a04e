"""Counts on a CPU the host reads for which the host would wait on a GPU.

A read is a tensor's value or copy taken by the host, or an operation whose output size depends on values. Tensors that
belong on the CPU do not count; the file that reads them identifies them.
"""

import collections
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A cache counts tokens, and an optimizer counts steps, in a CPU tensor; cuDNN's lengths are read earlier.
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
    """Returns the file of the models, the Trainer or the library that causes the read of a tensor."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if any(part in name for part in (*ON_PURPOSE, "moe_hf/", "/transformers/", "/accelerate/")):
            return name
        frame = frame.f_back
    return "torch"


@contextmanager
def counted_host_reads() -> Iterator[collections.Counter]:
    """Yields the counts {(kind, place in the code): count}, with places as "folder/file.py"."""
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
                result.was_read = True  # further reads of its values are free
            return result

        return method

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(name)))
        stack.enter_context(_SizedByValues(count))
        yield reads
