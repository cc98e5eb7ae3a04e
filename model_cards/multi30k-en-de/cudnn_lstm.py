"""Wraps cuDNN's LSTM over padded rows as one custom operation for torch.compile, forward and backward.

The wrapper exists because the compiler unrolls torch's own `lstm`, and because autocast always runs cuDNN's LSTM in
float16.

Shape suffixes: B batch, S sequence, D width of h, I width of the inputs, U units of the cell, L directions.
"""

import functools

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# A separate namespace for each copy of this file, because a checkpoint from the Hub brings its own copy.
_NAMESPACE = __name__.replace(".", "_")
_LSTM_MODE = 2  # cuDNN's number for an LSTM


def uses_cudnn(device: torch.device) -> bool:
    """Return whether cuDNN computes LSTMs on this device; ROCm and other devices have other kernels."""
    cudnn = torch.backends.cudnn
    return device.type == "cuda" and torch.version.hip is None and cudnn.enabled and cudnn.is_available()


@torch.compiler.assume_constant_result
@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Return whether cuDNN supports LSTMs in bfloat16 on this device. The first call tries it."""
    x, state = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((1, 1, 8), (1, 1, 8)))
    weights = [x.new_zeros(32, 8), x.new_zeros(32, 8), x.new_zeros(32)]
    try:
        outputs, _, _, reserve, buffer = _cudnn_lstm(x, None, None, state, state, weights, True)
        inputs = (x, None, None, state, state, weights, outputs, reserve, buffer)
        _cudnn_lstm_backward(outputs, state, state, *inputs)
    except RuntimeError:
        return False
    return True


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in: autocast's dtype, or the dtype of x.

    float32 replaces bfloat16 where cuDNN does not support it. float32 always replaces autocast's float16: gradients
    divided by a large batch underflow in float16, and a model cannot know whether its loss is scaled.
    """
    dtype, is_autocast = x.dtype, torch.is_autocast_enabled(x.device.type)
    if is_autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    if dtype == torch.float16 and is_autocast:
        return torch.float32
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16(x.device) else dtype


def cudnn_lstm(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    weights: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run an LSTM in one direction or two.

    Args:
        x: (B, S, I).
        mask: (B, S) bool, False for padding at any position; None without padding.
        lengths: (B,) int64 on the CPU, the number of real positions of each row; None: read from `mask`.
        h: (L, B, D), the output to start from.
        c: (L, B, U), the cell to start from.
        weights: for each direction weight_ih (4U, I), weight_hh (4U, D), bias (4U,), and weight_hr (D, U) if U != D.

    Returns:
        outputs (B, S, L * D), 0 at padding, and the last h and c, all in the type of `compute_dtype`.
    """
    dtype = compute_dtype(x)
    x, h, c, *weights = (tensor.to(dtype) for tensor in (x, h, c, *weights))
    # cuDNN refuses a backward pass after an inference forward pass. eval() alone does not mean inference.
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h, c, *weights))
    outputs, h, c, *_ = _cudnn_lstm(x, mask, lengths, h, c, weights, keep)
    return outputs, h, c


@torch.library.custom_op(f"{_NAMESPACE}::cudnn_lstm", mutates_args=())
def _cudnn_lstm(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    weights: list[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return outputs, last h and last c, and with `keep` cuDNN's reserve and weight buffer for the backward pass."""
    rows = OrderedRows(x, mask, lengths)
    inputs = (rows.data, *_two_biases(weights, h), None, *rows.states(h, c), *_options(h, c, keep))
    with torch.autocast(x.device.type, enabled=False):
        data, last_h, last_c, reserve, buffer = torch._cudnn_rnn(*inputs, rows.batch_sizes, None)
    last_h, last_c = rows.unsorted(last_h, h), rows.unsorted(last_c, c)
    return rows.unpack(data), last_h, last_c, reserve, buffer if keep else x.new_empty(0)


@torch.library.custom_op(f"{_NAMESPACE}::cudnn_lstm_backward", mutates_args=())
def _cudnn_lstm_backward(
    grad_outputs: torch.Tensor,
    grad_h: torch.Tensor,
    grad_c: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    weights: list[torch.Tensor],
    outputs: torch.Tensor,
    reserve: torch.Tensor,
    buffer: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients with respect to x, h, c and the weights."""
    rows = OrderedRows(x, mask, lengths)
    if mask is not None:
        grad_outputs = grad_outputs * mask[..., None]
    inputs = (rows.data, *_two_biases(weights, h), buffer, *rows.states(h, c), rows.pack(outputs))
    grads = (rows.pack(grad_outputs), *rows.states(*map(rows.of_rows_with_tokens, (grad_h, grad_c))))
    # cuDNN gets a copy of its reserve, because it writes into it, and a second backward pass may need the original.
    grad_data, grad_first_h, grad_first_c, grad_weights = torch.ops.aten._cudnn_rnn_backward(
        *inputs, *grads, *_options(h, c, True), rows.batch_sizes, None, reserve.clone(), [True] * 4
    )
    grad_first_h, grad_first_c = rows.unsorted(grad_first_h, grad_h), rows.unsorted(grad_first_c, grad_c)
    stride = len(grad_weights) // len(h)
    # Copies, because cuDNN writes all gradients into one buffer. The second bias is not a parameter.
    grad_weights = [grad.clone() for place, grad in enumerate(grad_weights) if place % stride != 3]
    return rows.unpack(grad_data), grad_first_h, grad_first_c, grad_weights


class OrderedRows:
    """Rows in the order that cuDNN reads: time first; with padding, packed with the longest row first.

    `data` is x in that order. `batch_sizes` is the number of rows at each position, or [] without padding.
    """

    def __init__(self, x: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor | None):
        self.mask, self.length = mask, x.shape[1]
        if mask is None:
            self.data, self.batch_sizes = self.pack(x), []
            return
        # Real positions come first, in order. A row without real positions runs one step, whose result is dropped.
        self.order_BS = mask.int().argsort(dim=1, descending=True, stable=True)
        # With a device map, the library moves the lengths to the device.
        self.lengths_B = (mask.sum(dim=1) if lengths is None else lengths).cpu().clamp_min(1)
        self.has_tokens_B1 = mask.any(dim=1)[:, None]
        self.packed = self._pack(x)
        self.data, self.batch_sizes = self.packed.data, self.packed.batch_sizes.tolist()

    def _pack(self, x: torch.Tensor) -> PackedSequence:
        x = x.gather(1, self.order_BS[..., None].expand_as(x))
        return pack_padded_sequence(x, self.lengths_B, batch_first=True, enforce_sorted=False)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return another tensor (B, S, ...) of these rows in the order of `data`."""
        return x.transpose(0, 1).contiguous() if self.mask is None else self._pack(x).data

    def unpack(self, data: torch.Tensor) -> torch.Tensor:
        """Return (B, S, ...) from the order of `data`, with 0 at padding."""
        if self.mask is None:
            return data.transpose(0, 1).contiguous()
        packed = self.packed._replace(data=data)
        x, _ = pad_packed_sequence(packed, batch_first=True, total_length=self.length)
        return x.gather(1, self.order_BS.argsort(dim=1)[..., None].expand_as(x)) * self.mask[..., None]

    def states(self, *states: torch.Tensor) -> list[torch.Tensor]:
        """Return states (L, B, ...) with the rows in cuDNN's order."""
        if self.mask is None:
            return [state.contiguous() for state in states]
        return [state.index_select(1, self.packed.sorted_indices) for state in states]

    def unsorted(self, state: torch.Tensor, without_tokens: torch.Tensor) -> torch.Tensor:
        """Return a state with rows in original order; a row without tokens gets its state from `without_tokens`."""
        if self.mask is None:
            return state
        state = state.index_select(1, self.packed.unsorted_indices)
        return torch.where(self.has_tokens_B1, state, without_tokens)

    def of_rows_with_tokens(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self.mask is None else grad * self.has_tokens_B1


def _two_biases(weights: list[torch.Tensor], h: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Return cuDNN's list of weights, with a second bias per direction, and the number of weights per direction."""
    count = len(weights) // len(h)
    directions = [weights[i : i + count] for i in range(0, len(weights), count)]
    both = [[ih, hh, bias, torch.zeros_like(bias), *hr] for ih, hh, bias, *hr in directions]
    return [weight for direction in both for weight in direction], count + 1


def _options(h: torch.Tensor, c: torch.Tensor, keep: bool) -> tuple:
    """Return mode, units, size of the projection (0: none), layers, batch first, dropout, training, bidirectional."""
    units, width = c.shape[2], h.shape[2]
    return _LSTM_MODE, units, 0 if units == width else width, 1, False, 0.0, keep, len(h) == 2


@_cudnn_lstm.register_fake
def _(x, mask, lengths, h, c, weights, keep):
    outputs = x.new_empty(*x.shape[:2], len(h) * h.shape[2])
    # Only cuDNN knows the sizes of these two buffers.
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(2)] if keep else [0, 0]
    reserve, buffer = x.new_empty(sizes[0], dtype=torch.uint8), x.new_empty(sizes[1])
    return outputs, torch.empty_like(h), torch.empty_like(c), reserve, buffer


@_cudnn_lstm_backward.register_fake
def _(grad_outputs, grad_h, grad_c, x, mask, lengths, h, c, weights, outputs, reserve, buffer):
    contiguous = [tensor.new_empty(tensor.shape) for tensor in (x, h, c, *weights)]
    return *contiguous[:3], contiguous[3:]


def _keep_for_backward(ctx, inputs, output):
    x, mask, lengths, h, c, weights, _ = inputs
    outputs, *_, reserve, buffer = output
    ctx.mark_non_differentiable(reserve, buffer)
    ctx.save_for_backward(x, mask, lengths, h, c, *weights, outputs, reserve, buffer)


def _backward(ctx, grad_outputs, grad_h, grad_c, *_):
    x, mask, lengths, h, c, *weights, outputs, reserve, buffer = ctx.saved_tensors
    inputs = (x, mask, lengths, h, c, weights, outputs, reserve, buffer)
    grad_x, grad_h, grad_c, grad_weights = _cudnn_lstm_backward(grad_outputs, grad_h, grad_c, *inputs)
    return grad_x, None, None, grad_h, grad_c, grad_weights, None


_cudnn_lstm.register_autograd(_backward, setup_context=_keep_for_backward)
