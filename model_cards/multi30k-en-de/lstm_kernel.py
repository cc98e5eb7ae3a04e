"""An LSTM over whole sequences with a backward pass written by hand, for processors without a fused kernel.

torch's own CPU kernel keeps a graph of every step. Its backward pass fills a gradient of the whole sequence with zeros
at each step, and a recurrent projection makes it even slower. Here, values that do not depend on the previous step are
computed for all steps at once, forward and backward. Padding is a mask instead of a packed sequence.

Shape suffixes: B batch, S sequence, D width of h, I width of the inputs, U units of the cell.
"""

import torch
from torch import nn

from .autocast import autocast_dtype

# A separate namespace for each copy of this file, because a checkpoint from the Hub brings its own copy.
_NAMESPACE = __name__.replace(".", "_")


def lstm_sequence(
    lstm: nn.Module,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    reverse: bool = False,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one direction of an LSTM.

    Args:
        lstm: has weight_ih (4U, I), weight_hh (4U, D), bias (4U,), and weight_hr (D, U), or None if D = U.
        x: (B, S, I).
        mask: (B, S) bool, False for padding; None without padding.
        h: (B, D), the output to start from.
        c: (B, U), the cell to start from.
        reverse: whether to read the sequence from its end.
        starts: (B, S) bool, positions where the state restarts from zero; None: nowhere. Not with `reverse`.

    Returns:
        outputs (B, S, D), 0 at padding, and the last h and c.
    """
    tensors = [x, h, c, lstm.weight_ih, lstm.weight_hh, lstm.bias, lstm.weight_hr]
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    x, h, c, *weights = tensors
    outputs, h, c, *_ = _lstm(x, mask, h, c, *weights, reverse, starts)
    return outputs, h, c


@torch.library.custom_op(f"{_NAMESPACE}::lstm", mutates_args=())
def _lstm(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    weight_hr: torch.Tensor | None,
    reverse: bool,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return outputs, last h and last c.

    For the backward pass, also return the gates (B, S, 4U) in torch's order, and h (B, S, D) and c (B, S, U) after
    each position.
    """
    batch, length, _ = x.shape
    units = weight_ih.shape[0] // 4
    gates_BSG = torch.addmm(bias, x.reshape(batch * length, -1), weight_ih.t()).view(batch, length, 4 * units)
    all_h = x.new_empty(batch, length, weight_hh.shape[1])
    all_c = x.new_empty(batch, length, units)
    steps, padded = _steps(length, reverse), _marked(None if mask is None else ~mask)
    restarted = _marked(starts)
    squashed = x.new_empty(batch, units)
    to_gates, project = weight_hh.t(), None if weight_hr is None else weight_hr.t()
    # All views are created at once, because creating a view takes a large part of the time of a small step.
    gates_of, h_of, c_of = gates_BSG.unbind(1), all_h.unbind(1), all_c.unbind(1)
    first_two_of = gates_BSG[..., : 2 * units].unbind(1)
    input_of, forget_of, values_of, output_of = (part.unbind(1) for part in gates_BSG.chunk(4, dim=2))
    for t in steps:
        new_h, new_c = h_of[t], c_of[t]
        if t in restarted:
            h, c = (state.masked_fill(starts[:, t, None], 0) for state in (h, c))
        gates_of[t].addmm_(h, to_gates)
        first_two_of[t].sigmoid_()
        output_of[t].sigmoid_()
        torch.mul(forget_of[t], c, out=new_c).addcmul_(input_of[t], values_of[t].tanh_())
        torch.tanh(new_c, out=squashed)
        if project is None:
            torch.mul(output_of[t], squashed, out=new_h)
        else:
            torch.mm(squashed.mul_(output_of[t]), project, out=new_h)
        if t in padded:
            is_padding = ~mask[:, t, None]
            new_c.copy_(torch.where(is_padding, c, new_c))
            new_h.copy_(torch.where(is_padding, h, new_h))
        h, c = new_h, new_c
    outputs = all_h.clone() if mask is None else all_h * mask[..., None]
    return outputs, h.clone(), c.clone(), gates_BSG, all_h, all_c


@torch.library.custom_op(f"{_NAMESPACE}::lstm_backward", mutates_args=())
def _lstm_backward(
    grad_outputs: torch.Tensor,
    grad_h: torch.Tensor,
    grad_c: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    weight_hr: torch.Tensor | None,
    gates_BSG: torch.Tensor,
    all_h: torch.Tensor,
    all_c: torch.Tensor,
    reverse: bool,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, h, c, weight_ih, weight_hh, bias and weight_hr (empty without a projection)."""
    batch, length, units = all_c.shape
    h_before, c_before = _shifted(all_h, h, reverse), _shifted(all_c, c, reverse)
    if starts is not None:
        h_before, c_before = (state.masked_fill(starts[..., None], 0) for state in (h_before, c_before))
    input_gate, forget_gate, values, output_gate = gates_BSG.chunk(4, dim=2)
    squashed = all_c.tanh()
    # Factors of a step's incoming gradients: of c for the first three gates, and of h for the last gate.
    slopes = torch.empty_like(gates_BSG)
    of_input, of_forget, of_values, of_output = slopes.chunk(4, dim=2)
    torch.ops.aten.sigmoid_backward.grad_input(values, input_gate, grad_input=of_input)
    torch.ops.aten.sigmoid_backward.grad_input(c_before, forget_gate, grad_input=of_forget)
    torch.ops.aten.tanh_backward.grad_input(input_gate, values, grad_input=of_values)
    torch.ops.aten.sigmoid_backward.grad_input(squashed, output_gate, grad_input=of_output)
    c_from_h = torch.ops.aten.tanh_backward(output_gate, squashed)
    projected = None if weight_hr is None else torch.empty_like(all_h)

    grad_h, grad_c = grad_h.clone(), grad_c.clone()
    if mask is not None:
        grad_outputs = grad_outputs * mask[..., None]
    steps, padded = _steps(length, reverse), _marked(None if mask is None else ~mask)
    restarted = _marked(starts)
    grad_outputs_of, c_from_h_of, forget_of = grad_outputs.unbind(1), c_from_h.unbind(1), forget_gate.unbind(1)
    grad_gates_of, from_h_of = slopes.unbind(1), of_output.unbind(1)
    from_c_of = slopes[..., : 3 * units].view(batch, length, 3, units).unbind(1)
    for t in reversed(steps):
        grad_h += grad_outputs_of[t]
        if t in padded:
            is_padding = ~mask[:, t, None]
            passed_h, passed_c = grad_h * is_padding, grad_c * is_padding
            grad_h.masked_fill_(is_padding, 0)
            grad_c.masked_fill_(is_padding, 0)
        hidden = grad_h
        if projected is not None:
            projected[:, t] = grad_h
            hidden = grad_h @ weight_hr
        grad_c.addcmul_(hidden, c_from_h_of[t])
        from_c_of[t].mul_(grad_c[:, None])
        from_h_of[t].mul_(hidden)
        grad_c.mul_(forget_of[t])
        torch.mm(grad_gates_of[t], weight_hh, out=grad_h)
        if t in padded:
            grad_h += passed_h
            grad_c += passed_c
        if t in restarted:
            grad_h.masked_fill_(starts[:, t, None], 0)
            grad_c.masked_fill_(starts[:, t, None], 0)

    flat = slopes.view(batch * length, -1)
    grad_x = (flat @ weight_ih).view_as(x)
    grad_ih = flat.t() @ x.reshape(batch * length, -1)
    grad_hh = flat.t() @ h_before.reshape(batch * length, -1)
    grad_hr = x.new_empty(0)
    if weight_hr is not None:
        grad_hr = projected.view(batch * length, -1).t() @ (output_gate * squashed).view(batch * length, -1)
    return grad_x, grad_h, grad_c, grad_ih, grad_hh, flat.sum(0), grad_hr


def _steps(length: int, reverse: bool) -> list[int]:
    """Return the positions in the order of reading."""
    return list(range(length))[:: -1 if reverse else 1]


def _marked(marks: torch.Tensor | None) -> set[int]:
    """Return the positions at which at least one row of (B, S) is marked."""
    return set() if marks is None else set(marks.any(dim=0).nonzero()[:, 0].tolist())


def _shifted(states: torch.Tensor, first: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Return the states before each position, from the states after each position."""
    if reverse:
        return torch.cat([states[:, 1:], first[:, None]], dim=1)
    return torch.cat([first[:, None], states[:, :-1]], dim=1)


@_lstm.register_fake
def _(x, mask, h, c, weight_ih, weight_hh, bias, weight_hr, reverse, starts):
    batch, length, _ = x.shape
    units, width = weight_ih.shape[0] // 4, weight_hh.shape[1]
    outputs, all_h = x.new_empty(batch, length, width), x.new_empty(batch, length, width)
    gates, all_c = x.new_empty(batch, length, 4 * units), x.new_empty(batch, length, units)
    return outputs, torch.empty_like(h), torch.empty_like(c), gates, all_h, all_c


@_lstm_backward.register_fake
def _(grad_outputs, grad_h, grad_c, x, mask, h, c, weight_ih, weight_hh, weight_hr, *_):
    grads = [torch.empty_like(tensor) for tensor in (x, h, c, weight_ih, weight_hh)]
    grad_hr = x.new_empty(0) if weight_hr is None else torch.empty_like(weight_hr)
    return *grads, x.new_empty(len(weight_ih)), grad_hr


def _keep_for_backward(ctx, inputs, output):
    x, mask, h, c, weight_ih, weight_hh, _, weight_hr, ctx.reverse, starts = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(starts, x, mask, h, c, weight_ih, weight_hh, weight_hr, *output[3:])


def _backward(ctx, grad_outputs, grad_h, grad_c, *_):
    starts, *saved = ctx.saved_tensors
    *grads, grad_hr = _lstm_backward(grad_outputs, grad_h, grad_c, *saved, ctx.reverse, starts)
    grad_x, grad_h, grad_c, grad_ih, grad_hh, grad_bias = grads
    grad_hr = grad_hr if grad_hr.numel() else None
    return grad_x, None, grad_h, grad_c, grad_ih, grad_hh, grad_bias, grad_hr, None, None


_lstm.register_autograd(_backward, setup_context=_keep_for_backward)
