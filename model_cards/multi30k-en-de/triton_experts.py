"""Computes the experts on a GPU with Triton kernels, for any number of experts, in float32, bfloat16 and float16.

Slots are sorted by expert once. The first kernel gathers each token's row and computes its hidden units, the second
computes the outputs, and the third computes the weighted sum of a token's slots. The backward pass is written by hand
and uses the same kernels.

- Idle experts cost nothing in the forward pass, and their gradients are exactly zero. Slots of weight 0 are skipped.
- A gate's gradient is computed in the hidden space, w' = <dE/dh, h>, so expert outputs are not stored.
- Under autocast, the kernels read float32 weights and cast them while computing. The experts are not copied as a
  whole, and their gradients are not rounded to the smaller dtype.
- The host never waits for the GPU, so a CUDA graph can capture a step.

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size, R = T * K slots.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from .segment_experts import compute_dtype
from .triton_kernels import IS_INTERPRETED, combine_kernel, rows_kernel, tl, triton, weights_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A separate namespace for each copy of this file, because a checkpoint from the Hub brings its own copy.
_NAMESPACE = __name__.replace(".", "_")


class Blocks(NamedTuple):
    """The block sizes of a product, and the launch options of a program."""

    rows: int
    inputs: int
    outputs: int
    num_warps: int
    num_stages: int


def triton_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute `MoeExperts.forward` for one hidden layer of ReLU units.

    A slot whose weight is exactly 0 is skipped, so this weight gets no gradient. Second derivatives are not supported.

    Raises:
        ValueError: the kernels do not support the dtype.
        RuntimeError: the tensors are on a CPU, and the kernels are not interpreted.
    """
    work_dtype = compute_dtype(hidden_states)
    for kind in (work_dtype, module.up_proj.dtype, module.down_proj.dtype):
        if kind not in DTYPES:
            raise ValueError(
                f"experts_implementation='triton' computes in float32, bfloat16 or float16, not {kind}; use 'moe_hf'"
            )
    if hidden_states.device.type == "cpu" and not IS_INTERPRETED:
        raise RuntimeError(
            "experts_implementation='triton' needs a GPU, but the inputs are on a CPU; use 'moe_hf' there "
            "(for tests of the kernels, set TRITON_INTERPRET=1 before Python starts)"
        )
    tensors = (hidden_states, top_k_weights, module.up_proj, module.down_proj)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    x = hidden_states.to(work_dtype)
    output, *_ = _experts(x, top_k_index, top_k_weights, module.up_proj, module.down_proj, keep)
    return output.to(hidden_states.dtype)


def rows_blocks(rows_per_expert: float, dtype: torch.dtype) -> Blocks:
    """Return the block sizes for products of rows with their expert's matrix. Not measured on a GPU yet.

    Args:
        rows_per_expert: mean number of rows per expert, if all experts are used.
        dtype: dtype of the rows.
    """
    rows = 16
    while rows < min(rows_per_expert, 128):
        rows *= 2
    if dtype == torch.float32:
        return Blocks(min(rows, 64), 32, 64, num_warps=4, num_stages=2)
    return Blocks(rows, 32, 128, num_warps=8 if rows == 128 else 4, num_stages=3)


def weights_blocks(rows_per_expert: float, dtype: torch.dtype) -> Blocks:
    """Return the block sizes for the experts' gradients: `inputs` for left, `outputs` for right. Not measured yet."""
    if dtype == torch.float32:
        return Blocks(16, 64, 64, num_warps=4, num_stages=2)
    return Blocks(16 if rows_per_expert <= 16 else 32, 128, 128, num_warps=8, num_stages=3)


class Routing(NamedTuple):
    """The slots, sorted by expert.

    Attributes:
        order: (R,), slots sorted by expert, unused slots last.
        offsets: (E + 1,) int32, the start of each expert's rows in `order`; the last entry is the number of used
            slots.
        is_used: (T, K) bool.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    is_used: torch.Tensor


def sort_slots(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Routing:
    """Sort slots by expert, without a host read."""
    is_used = (weights != 0) & (index < num_experts)
    ids_R = index.masked_fill(~is_used, num_experts).view(-1)
    sorted_R, order_R = ids_R.to(torch.int16 if num_experts < 2**15 else torch.int32).sort(stable=True)
    experts = torch.arange(num_experts + 1, device=index.device, dtype=sorted_R.dtype)
    return Routing(order_R, torch.searchsorted(sorted_R, experts, out_int32=True), is_used)


def _tiles(offsets: torch.Tensor, num_slots: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expert of each tile of `block_rows` rows (E for unused tiles), and the end of each expert's tiles."""
    num_experts = len(offsets) - 1
    tile_ends = offsets.diff().add_(block_rows - 1).floor_divide_(block_rows).cumsum(0, dtype=torch.int32)
    # The largest possible number of tiles: each used expert wastes at most block_rows - 1 rows.
    most = (num_slots + min(num_experts, num_slots) * (block_rows - 1)) // block_rows
    tiles = torch.arange(most, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(tile_ends, tiles, right=True, out_int32=True), tile_ends


class _Products:
    """The kernels, bound to the arguments that all calls in one pass share."""

    def __init__(self, routing: Routing, weights: torch.Tensor, num_experts: int, dtype: torch.dtype):
        self.routing, self.weights, self.num_experts = routing, weights, num_experts
        num_slots = len(routing.order)
        self.blocks = rows_blocks(num_slots / num_experts, dtype)
        self.weights_blocks = weights_blocks(num_slots / num_experts, dtype)
        self.tiles, self.tile_ends = _tiles(routing.offsets, num_slots, self.blocks.rows)
        self.precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        # The interpreter cannot multiply bfloat16, but products of bfloat16 factors are exact in float32.
        self.product_dtype = tl.float32 if IS_INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))
        self.on_device = torch.cuda.device(weights.device) if weights.is_cuda else nullcontext()

    def rows(self, rows, weight, output, *, gathers=False, scatters=False, epilogue="none", hidden=None, dots=None):
        """Run `rows_kernel`; `weight` is (E, inputs, outputs), a view in any layout."""
        num_slots, (_, num_inputs, num_outputs), blocks = len(output), weight.shape, self.blocks
        grid = (len(self.tiles) * triton.cdiv(num_outputs, blocks.outputs),)
        order, offsets, _ = self.routing
        with self.on_device:
            rows_kernel[grid](
                *(rows, weight, output, order, self.tiles, self.tile_ends, offsets, hidden, self.weights, dots),
                *(self.num_experts, num_slots, num_inputs, num_outputs, *weight.stride()),
                slots_per_token=self.weights.shape[1],
                gathers=gathers,
                scatters=scatters,
                epilogue=epilogue,
                product_dtype=self.product_dtype,
                precision=self.precision,
                block_rows=blocks.rows,
                block_inputs=blocks.inputs,
                block_outputs=blocks.outputs,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )
        return output

    def weight_gradient(self, left, right, output, gathers_left):
        """Run `weights_kernel`, which scales a gathered left side by the weights."""
        (_, num_left, num_right), blocks = output.shape, self.weights_blocks
        programs = triton.cdiv(num_left, blocks.inputs) * triton.cdiv(num_right, blocks.outputs)
        order, offsets, _ = self.routing
        with self.on_device:
            weights_kernel[(self.num_experts * programs,)](
                *(left, right, output, order, offsets, self.weights, num_left, num_right),
                slots_per_token=self.weights.shape[1],
                gathers_left=gathers_left,
                product_dtype=self.product_dtype,
                precision=self.precision,
                block_rows=blocks.rows,
                block_left=blocks.inputs,
                block_right=blocks.outputs,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )
        return output

    def combine(self, rows_RD, weighs):
        """Return the sum of each token's slots, (T, D)."""
        (num_tokens, k), width = self.weights.shape, rows_RD.shape[1]
        output, block_tokens, block_width = rows_RD.new_empty(num_tokens, width), 4, 256
        grid = (triton.cdiv(num_tokens, block_tokens) * triton.cdiv(width, block_width),)
        with self.on_device:
            combine_kernel[grid](
                *(rows_RD, output, self.routing.is_used, self.weights, num_tokens, width),
                slots_per_token=k,
                weighs=weighs,
                block_tokens=block_tokens,
                block_width=block_width,
            )
        return output


@torch.library.custom_op(f"{_NAMESPACE}::triton_experts", mutates_args=())
def _experts(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the experts from x (T, D), index and weights (T, K), up (E, H, D), down (E, D, H).

    Returns the output (T, D), and tensors for the backward pass: the hidden units (R, H), which are sorted by expert
    and empty without `keep`, and the three tensors of `Routing`.
    """
    x, weights, (num_experts, num_hidden, width) = x.contiguous(), weights.contiguous(), up.shape
    routing = sort_slots(index, weights, num_experts)
    products = _Products(routing, weights, num_experts, x.dtype)
    hidden_RH, rows_RD = x.new_empty(weights.numel(), num_hidden), x.new_empty(weights.numel(), width)
    products.rows(x, up.mT, hidden_RH, gathers=True, epilogue="relu")
    products.rows(hidden_RH, down.mT, rows_RD, scatters=True)
    output = products.combine(rows_RD, weighs=True)
    return output, hidden_RH if keep else x.new_empty(0, num_hidden), *routing


@torch.library.custom_op(f"{_NAMESPACE}::triton_experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hidden_RH: torch.Tensor,
    order_R: torch.Tensor,
    offsets: torch.Tensor,
    is_used: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients with respect to x, weights, up and down."""
    x, grad, weights, num_slots = x.contiguous(), grad.contiguous(), weights.contiguous(), weights.numel()
    products = _Products(Routing(order_R, offsets, is_used), weights, len(up), x.dtype)
    num_blocks = triton.cdiv(up.shape[1], products.blocks.outputs)
    dots = torch.zeros(num_blocks, num_slots, dtype=torch.float32, device=x.device)
    grad_RH, grad_rows_RD = torch.empty_like(hidden_RH), x.new_empty(num_slots, x.shape[1])
    products.rows(grad, down, grad_RH, gathers=True, epilogue="backward", hidden=hidden_RH, dots=dots)
    products.rows(grad_RH, up, grad_rows_RD, scatters=True)
    grad_up = products.weight_gradient(grad_RH, x, _empty(up), gathers_left=False)
    grad_down = products.weight_gradient(grad, hidden_RH, _empty(down), gathers_left=True)
    grad_weights = dots.sum(0).view_as(weights).to(weights.dtype)
    return products.combine(grad_rows_RD, weighs=False), grad_weights, grad_up, grad_down


def _empty(weight: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same shape."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_experts.register_fake
def _(x, index, weights, up, down, keep):
    slots = index.numel()
    hidden = x.new_empty(slots if keep else 0, up.shape[1])
    offsets = index.new_empty(up.shape[0] + 1, dtype=torch.int32)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    return output, hidden, index.new_empty(slots), offsets, index.new_empty(index.shape, dtype=torch.bool)


@_experts_backward.register_fake
def _(grad, x, weights, up, down, hidden_RH, order_R, offsets, is_used):
    return _empty(x), _empty(weights), _empty(up), _empty(down)


def _keep_for_backward(ctx, inputs, output):
    x, _, weights, up, down, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weights, up, down, *output[1:])


def _backward(ctx, grad, *_):
    grad_x, grad_weights, grad_up, grad_down = _experts_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_up, grad_down, None


_experts.register_autograd(_backward, setup_context=_keep_for_backward)
