"""Data parallelism with factored gradients of experts: processes exchange rows, which are smaller than gradients."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..models.factored_gradients import RowGradients, merge_rows, row_gradients

EXPERTS_DIM = "ep"  # of Transformers' mesh: processes along it have different experts, along others copies of them


@torch.no_grad()
def gather_rows(model: nn.Module) -> None:
    """Give every process the rows of all processes, divided by their number, as DDP and FSDP average other gradients.

    With expert parallelism, the owner of an expert already has the rows of all tokens. Only processes with copies of
    the same expert exchange rows, and each keeps the rows of the experts that it steps.

    All processes must call this function after the same backward passes, and before clipping. A single process need
    not call it.

    Args:
        model: a model with `use_factored_gradients`, the same on every process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parts := row_gradients(parameter):
            parameter.row_gradients = [_mean(merge_rows(parts), parameter)]


def _mean(rows: RowGradients, parameter: nn.Parameter) -> RowGradients:
    if not isinstance(parameter, DTensor):
        return _gather(_over(rows, dist.get_world_size()), dist.group.WORLD)
    mesh = parameter.device_mesh
    rows = _over(rows, mesh.size())
    for dim, name in enumerate(mesh.mesh_dim_names):
        if name != EXPERTS_DIM and mesh.size(dim) > 1:
            rows = _gather(rows, mesh.get_group(dim))
            if not parameter.placements[dim].is_replicate():
                rows = _own(rows, mesh.get_local_rank(dim), mesh.size(dim))
    return rows


def _over(rows: RowGradients, number: int) -> RowGradients:
    return rows._replace(left=rows.left / number)


def _gather(rows: RowGradients, group: dist.ProcessGroup) -> RowGradients:
    """Return the rows of all processes of a group."""
    counts = [torch.empty_like(rows.counts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, rows.counts, group=group)
    totals = [int(count.sum()) for count in counts]
    left, right = (_gather_padded(side, totals, group) for side in (rows.left, rows.right))
    return merge_rows([RowGradients(*part) for part in zip(left, right, counts)])


def _gather_padded(rows: torch.Tensor, totals: list[int], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return the tensors (total, ...) of all processes, which are padded to the longest one for the exchange."""
    padded = rows.new_zeros(max(totals), *rows.shape[1:])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in totals]
    dist.all_gather(received, padded, group=group)
    return [part[:total] for part, total in zip(received, totals)]


def _own(rows: RowGradients, rank: int, num_parts: int) -> RowGradients:
    """Return the rows of this process's experts. FSDP splits experts into equal parts; the last may be smaller."""
    size = math.ceil(len(rows.counts) / num_parts)
    before, own, _ = rows.counts.tensor_split([rank * size, (rank + 1) * size])
    here = slice(int(before.sum()), int(before.sum() + own.sum()))
    return RowGradients(rows.left[here], rows.right[here], own)
