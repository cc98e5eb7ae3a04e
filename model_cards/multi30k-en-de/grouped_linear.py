"""Multiplies each row by the matrix of its group, in one operation: the secondary logits of a hierarchical gate.

Shape suffixes: R rows, sorted by group, D width, G groups, M outputs of a group, N blocks, B rows of a block.
"""

import torch

from .float32_products import full_float32
from .host_reads import host_reads_are_free

# A separate namespace for each copy of this file, because a checkpoint from the Hub brings its own copy.
_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::grouped_linear", mutates_args=())
def grouped_linear(rows_RD: torch.Tensor, weight_GMD: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Return x W_i^T, where each row uses the matrix of its group i.

    Args:
        rows_RD: (R, D), sorted by group.
        weight_GMD: (G, M, D), in the dtype of the rows.
        ends_G: (G,) int64, the end of each group's rows. Rows after the last end do not belong to a group.

    Returns:
        (R, M), 0 for a row without a group. The result is differentiable; the gradient of an idle group is 0.
    """
    if not host_reads_are_free(rows_RD.device):
        with full_float32(rows_RD.device):
            return _blockwise(rows_RD, weight_GMD, ends_G)
    output_RM = rows_RD.new_empty(len(rows_RD), weight_GMD.shape[1])
    start = 0
    for group, end in enumerate(ends_G.tolist()):
        if start < end:
            torch.mm(rows_RD[start:end], weight_GMD[group].t(), out=output_RM[start:end])
        start = end
    output_RM[start:] = 0
    return output_RM


@torch.library.custom_op(f"{_NAMESPACE}::grouped_linear_backward", mutates_args=())
def _backward(
    grad_RM: torch.Tensor, rows_RD: torch.Tensor, weight_GMD: torch.Tensor, ends_G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients with respect to the rows and the matrices."""
    if not host_reads_are_free(rows_RD.device):
        return _blockwise_backward(grad_RM, rows_RD, weight_GMD, ends_G)
    grad_rows_RD, grad_weight_GMD = torch.empty_like(rows_RD), torch.empty_like(weight_GMD)
    start = 0
    for group, end in enumerate(ends_G.tolist()):
        if start < end:
            torch.mm(grad_RM[start:end], weight_GMD[group], out=grad_rows_RD[start:end])
            torch.mm(grad_RM[start:end].t(), rows_RD[start:end], out=grad_weight_GMD[group])
        else:
            grad_weight_GMD[group] = 0
        start = end
    grad_rows_RD[start:] = 0
    return grad_rows_RD, grad_weight_GMD


def _blockwise(rows_RD: torch.Tensor, weight_GMD: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Compute `grouped_linear` in a fixed number of launches, without a host read.

    The rows of each group are padded to whole blocks, and one batched product computes all blocks. A block has about
    the mean number of rows of a group, so there are at most 2 G blocks, even for very uneven groups.
    """
    place_R, group_N, size = _blocks(rows_RD, ends_G)
    products_NBM = torch.bmm(_to_blocks(rows_RD, place_R, group_N, size), weight_GMD[group_N].transpose(1, 2))
    return _from_blocks(products_NBM, place_R)


def _blockwise_backward(
    grad_RM: torch.Tensor, rows_RD: torch.Tensor, weight_GMD: torch.Tensor, ends_G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    place_R, group_N, size = _blocks(rows_RD, ends_G)
    grad_NBM = _to_blocks(grad_RM, place_R, group_N, size)
    grad_rows_RD = _from_blocks(torch.bmm(grad_NBM, weight_GMD[group_N]), place_R)
    rows_NBD = _to_blocks(rows_RD, place_R, group_N, size)
    grad_weight_NMD = torch.bmm(grad_NBM.transpose(1, 2), rows_NBD)
    return grad_rows_RD, torch.zeros_like(weight_GMD).index_add_(0, group_N, grad_weight_NMD)


def _blocks(rows_RD: torch.Tensor, ends_G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return each row's place in the flattened blocks (R,), each block's group (N,), and B.

    A row without a group gets the place N * B, one after the last block.
    """
    num_rows, num_groups = len(rows_RD), len(ends_G)
    size = max(16, -(-num_rows // num_groups))
    num_blocks = num_rows // size + num_groups  # at least the sum of ceil(rows of a group / B)
    starts_G = torch.nn.functional.pad(ends_G[:-1], (1, 0))
    last_G = ((ends_G - starts_G + size - 1) // size).cumsum(0)
    first_G = torch.nn.functional.pad(last_G[:-1], (1, 0))
    row_R = torch.arange(num_rows, device=ends_G.device)
    group_R = torch.searchsorted(ends_G, row_R, right=True)
    known_R = group_R.clamp(max=num_groups - 1)
    place_R = torch.where(group_R < num_groups, (first_G * size - starts_G)[known_R] + row_R, num_blocks * size)
    block_N = torch.arange(num_blocks, device=ends_G.device)
    return place_R, torch.searchsorted(last_G, block_N, right=True).clamp(max=num_groups - 1), size


def _to_blocks(rows: torch.Tensor, place_R: torch.Tensor, group_N: torch.Tensor, size: int) -> torch.Tensor:
    """Return blocks (N, B, ...) of rows (R, ...), 0 in unused places."""
    blocks = rows.new_zeros(len(group_N) * size + 1, rows.shape[1]).index_copy_(0, place_R, rows)
    return blocks[:-1].view(len(group_N), size, -1)


def _from_blocks(blocks: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
    """Return rows (R, ...) from blocks (N, B, ...), 0 for a row without a group."""
    return torch.nn.functional.pad(blocks.flatten(0, 1), (0, 0, 0, 1)).index_select(0, place_R)


@grouped_linear.register_fake
def _(rows_RD, weight_GMD, ends_G):
    return rows_RD.new_empty(len(rows_RD), weight_GMD.shape[1])


@_backward.register_fake
def _(grad_RM, rows_RD, weight_GMD, ends_G):
    return torch.empty_like(rows_RD), torch.empty_like(weight_GMD)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


grouped_linear.register_autograd(
    lambda ctx, grad_RM: (*_backward(grad_RM.contiguous(), *ctx.saved_tensors), None), setup_context=_keep_for_backward
)
