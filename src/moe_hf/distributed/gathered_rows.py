"""Data parallelism of experts with factored gradients: processes exchange rows, which are fewer than the gradients."""

import torch
import torch.distributed as dist
from torch import nn

from ..models.factored_gradients import RowGradients, merge_rows, row_gradients


@torch.no_grad()
def gather_rows(model: nn.Module) -> None:
    """Give every process the rows of all, over their number: the mean that DDP takes of the other gradients.

    All processes must call it, after the same backward passes. It does nothing in a single process.

    Args:
        model: with `use_factored_gradients`, the same on every process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parts := row_gradients(parameter):
            parameter.row_gradients = [_of_all_processes(merge_rows(parts))]


def _of_all_processes(rows: RowGradients) -> RowGradients:
    num_processes = dist.get_world_size()
    counts = [torch.empty_like(rows.counts) for _ in range(num_processes)]
    dist.all_gather(counts, rows.counts)
    totals = [int(count.sum()) for count in counts]
    left, right = (_gather(side, totals) for side in (rows.left / num_processes, rows.right))
    return merge_rows([RowGradients(*part) for part in zip(left, right, counts)])


def _gather(rows: torch.Tensor, totals: list[int]) -> list[torch.Tensor]:
    """The tensors (total, ...) of all processes; they travel padded to the longest."""
    padded = rows.new_zeros(max(totals), *rows.shape[1:])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in totals]
    dist.all_gather(received, padded)
    return [part[:total] for part, total in zip(received, totals)]
