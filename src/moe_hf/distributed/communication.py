"""Counts the bytes that collectives move in Transformers' expert parallelism, FSDP and DDP."""

from collections import Counter

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveCounter(TorchDispatchMode):
    """A context that counts the bytes that this rank sends to other ranks, forward and backward.

    torch's CommDebugMode counts calls, not bytes. Bytes that stay on the rank do not count. For P ranks and parts of
    size s, the counts are the minimum that each rank has to send:

    - all-gather and reduce-scatter: (P - 1) s
    - all-reduce of size s: 2 (P - 1) s / P
    - all-to-all: the exact number, from its split sizes

    Attributes:
        sent: {collective: bytes}, for "all_to_all", "all_to_all of counts" (integers), "all_gather", "reduce_scatter"
            and "all_reduce".
        calls: {collective: number of calls}.

    Raises:
        NotImplementedError: another collective that sends bytes was called.
    """

    def __init__(self):
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # it comes back as the operations on its parts, collectives among them
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"):
            return
        if name == "all_to_all_single":  # input, output splits, input splits, group
            group, splits = _resolve_process_group(args[3]), args[2]
            remote = sum(splits) - splits[group.rank()]
            self._add("all_to_all", args[0], remote * row_bytes(args[0]))
        elif name == "alltoall_base_":  # output, input, group, output splits, input splits: none are equal ones
            group, splits = ProcessGroup.unbox(args[2]), args[4]
            local = splits[group.rank()] if splits else len(args[1]) // group.size()
            self._add("all_to_all", args[1], (len(args[1]) - local) * row_bytes(args[1]))
        elif name == "_allgather_base_":  # output, input, group
            self._add("all_gather", args[1], args[0].nbytes - args[1].nbytes)
        elif name == "all_gather_into_tensor":  # input, size of the group
            self._add("all_gather", args[0], (args[1] - 1) * args[0].nbytes)
        elif name == "_reduce_scatter_base_":  # output, input
            self._add("reduce_scatter", args[1], args[1].nbytes - args[0].nbytes)
        elif name == "reduce_scatter_tensor":  # input, operation, size of the group
            self._add("reduce_scatter", args[0], args[0].nbytes - args[0].nbytes // args[2])
        elif name in ("allreduce_", "all_reduce"):
            is_functional = name == "all_reduce"  # tensor, operation, group; else tensors, group
            group = _resolve_process_group(args[2]) if is_functional else ProcessGroup.unbox(args[1])
            for tensor in [args[0]] if is_functional else args[0]:
                self._add("all_reduce", tensor, 2 * (group.size() - 1) * tensor.nbytes // group.size())
        else:
            raise NotImplementedError(f"the bytes of {name} are not counted yet")

    def _add(self, collective: str, tensor: torch.Tensor, sent: int) -> None:
        if collective == "all_to_all" and not tensor.is_floating_point():
            collective += " of counts"
        self.sent[collective] += sent
        self.calls[collective] += 1


def row_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of one row of the first dimension, even if the tensor is empty."""
    return tensor.element_size() * tensor.shape[1:].numel()
