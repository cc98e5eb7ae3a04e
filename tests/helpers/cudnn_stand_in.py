"""cuDNN's LSTM for a CPU: replaces two GPU-only operations of torch, with the same arguments and refusals.

torch's own LSTM computes the results.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch

from moe_hf.models import lstm

BUFFER = 7  # elements beyond the weights: nothing may depend on the size of cuDNN's buffer


def _run(x, weights, stride, h, c, mode, units, width, layers, batch_first, dropout, training, both, sizes):
    assert (mode, layers, batch_first, dropout) == (2, 1, False, 0.0)
    assert stride == len(weights) // len(h) == (5 if width else 4) and len(h) == (2 if both else 1)
    assert c.shape[2] == units and h.shape[2] == (width or units)
    assert all(tensor.dtype == x.dtype for tensor in (h, c, *weights))
    assert x.is_contiguous() and h.is_contiguous() and c.is_contiguous()
    options = (True, layers, dropout, False, both)
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # oneDNN does not support every dtype on every processor
    try:
        if sizes:
            return torch._VF.lstm(x, torch.tensor(sizes), (h, c), weights, *options)
        return torch._VF.lstm(x, (h, c), weights, *options, False)
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


def _cudnn_rnn(x, weights, stride, buffer, h, c, *options_and_dropout_state):
    *options, sizes, dropout_state = options_and_dropout_state
    assert buffer is None and dropout_state is None
    training = options[6]
    outputs = _run(x, weights, stride, h, c, *options, sizes)
    reserve = torch.zeros(5 * x.numel() if training else 0, dtype=torch.uint8)
    buffer = torch.cat([*(weight.flatten() for weight in weights), x.new_zeros(BUFFER)])
    return *outputs, reserve, buffer


def _cudnn_rnn_backward(x, weights, stride, buffer, h, c, y, grad_y, grad_h, grad_c, *options_and_mask):
    *options, sizes, dropout_state, reserve, mask = options_and_mask
    assert mask == [True] * 4 and dropout_state is None
    assert options[6] and len(reserve) == 5 * x.numel(), "cudnn RNN backward can only be called in training mode"
    assert not reserve.any(), "the reserve was used before"
    reserve.fill_(1)
    assert torch.equal(buffer[:-BUFFER], torch.cat([weight.flatten() for weight in weights]))

    def differentiate():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, h, c, *weights)]
        outputs = _run(leaves[0], leaves[3:], stride, *leaves[1:3], *options, sizes)
        assert y.shape == outputs[0].shape
        return torch.autograd.grad(outputs, leaves, (grad_y, grad_h, grad_c))

    # Runs in a separate thread, because autograd is switched off inside an operation.
    with ThreadPoolExecutor(1) as thread:
        grad_x, grad_h, grad_c, *grads = thread.submit(differentiate).result()
    buffer = torch.cat([grad.flatten() for grad in grads])
    parts = buffer.split([grad.numel() for grad in grads])
    return grad_x, grad_h, grad_c, [part.view_as(grad) for part, grad in zip(parts, grads)]


_library = torch.library.Library("aten", "IMPL")
_library.impl("_cudnn_rnn", _cudnn_rnn, "CPU")
_library.impl("_cudnn_rnn_backward", _cudnn_rnn_backward, "CPU")


@contextmanager
def cudnn_on_cpu() -> Iterator[None]:
    """Makes LSTMs use the code path for cuDNN."""
    with mock.patch.object(lstm, "uses_cudnn", lambda device: True):
        with mock.patch.object(lstm, "is_fused", lambda inputs, mask, lstm: True):
            yield
