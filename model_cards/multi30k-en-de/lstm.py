"""One LSTM layer with residual connection, dropout and optional recurrent projection (appendix C).

Shape suffixes: B batch, S sequence, D width (hidden_size), I width of the inputs, U units of the cell, L directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .autocast import autocast_dtype
from .configuration_moe import MoeConfig
from .cudnn_lstm import OrderedRows, cudnn_lstm, uses_cudnn
from .host_reads import is_on_host
from .lstm_kernel import lstm_sequence
from .packing import DocumentLanes
from .quantization import dequantized, is_int8, linear


class LstmWeights(NamedTuple):
    """The tensors of an `Lstm`, under the same names."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    bias: torch.Tensor
    weight_hr: torch.Tensor | None


def run_lstm(
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    directions: "Sequence[Lstm | LstmWeights]",
    training: bool,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run an LSTM in one direction or two. Padding is skipped: it does not change other positions or states.

    Args:
        inputs: (B, S, I).
        mask: (B, S) bool, False for padding at any position; None without padding.
        h: (L, B, D), the output before the first step of each direction.
        c: (L, B, U), the cell before the first step of each direction.
        directions: the weights of the forward direction, and of the backward direction if there are two.
        training: whether the fused kernel keeps the tensors that a backward pass needs.
        starts: (B, S) bool, positions where the state restarts from zero; only on a CPU, and for one direction.
        lengths: see `row_lengths`.

    Returns:
        outputs (B, S, L * D), 0 at padding, and the state after the last real step, like h and c.
    """
    is_elementary = inputs.shape[1] == 1 and starts is None and _is_step_elementary(inputs, directions[0])
    if not is_elementary:
        directions = [float_weights(lstm) for lstm in directions]
    if starts is not None:
        output, h, c = lstm_sequence(directions[0], inputs, mask, h[0], c[0], starts=starts)
        return output, h[None], c[None]
    if not is_elementary and not inputs.is_meta and is_fused(inputs, mask, directions[0]):
        return run_fused(inputs, mask, h, c, directions, training, lengths)
    run = lstm_step if is_elementary else lstm_sequence
    runs = [run(lstm, inputs, mask, h[i], c[i], reverse=i == 1) for i, lstm in enumerate(directions)]
    if len(runs) == 1:
        outputs, h, c = runs[0]
        return outputs, h[None], c[None]
    outputs, h, c = zip(*runs)
    return torch.cat(outputs, dim=-1), torch.stack(h), torch.stack(c)


def _is_step_elementary(inputs: torch.Tensor, lstm: "Lstm | LstmWeights") -> bool:
    """Return whether `lstm_step` computes a single position, with elementary operations.

    An exported step needs operations that every runtime has, and a compiled step needs operations that the compiler
    can fuse. The kernels are neither, and do not read 8-bit weights. Without gradients, the kernels also have more
    overhead.
    """
    if torch.compiler.is_compiling() or _has_int8(lstm):
        return True
    return inputs.device.type == "cpu" and not torch.is_grad_enabled() and autocast_dtype(inputs.device) is None


def _has_int8(lstm: "Lstm | LstmWeights") -> bool:
    return is_int8(lstm.weight_ih, lstm.weight_hh, lstm.weight_hr)


def float_weights(lstm: "Lstm | LstmWeights") -> "Lstm | LstmWeights":
    """Return the weights with float copies of quantized ones, which pays off for many positions."""
    if not _has_int8(lstm):
        return lstm
    weights = (lstm.weight_ih, lstm.weight_hh, lstm.bias, lstm.weight_hr)
    return LstmWeights(*(dequantized(weight, lstm.bias.dtype) for weight in weights))


def lstm_cell(
    gates: torch.Tensor, c: torch.Tensor, weight_hr: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next h (B, D) and c (B, U) from gates (B, 4U) before their activations and the current c (B, U)."""
    input_gate, forget_gate, new_values, output_gate = gates.chunk(4, dim=-1)
    c = torch.sigmoid(forget_gate) * c + torch.sigmoid(input_gate) * torch.tanh(new_values)
    h = torch.sigmoid(output_gate) * torch.tanh(c)
    return (h if weight_hr is None else linear(h, weight_hr)), c


def lstm_step(
    lstm: "Lstm | LstmWeights",
    x: torch.Tensor,
    mask: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `lstm_sequence` for one position, with elementary operations."""
    gates = linear(x[:, 0], lstm.weight_ih, lstm.bias)
    if is_int8(lstm.weight_hh):
        gates = gates + linear(h, lstm.weight_hh)
    else:
        gates = torch.addmm(gates, h, lstm.weight_hh.t())
    new_h, new_c = lstm_cell(gates, c, lstm.weight_hr)
    if mask is None:
        return new_h[:, None], new_h, new_c
    return new_h[:, None] * mask[..., None], torch.where(mask, new_h, h), torch.where(mask, new_c, c)


def row_lengths(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the mask (None if nothing is padding) and the rows' lengths on the host, if an LSTM needs them.

    cuDNN needs the lengths of padded rows on the host. All layers of a stack share one host read.

    Args:
        mask: (B, S) bool, False for padding; None without padding.

    Returns:
        mask, and the number of real positions of each row, (B,) int64 on the CPU; None if the LSTMs do not need it.
    """
    if mask is None or mask.shape[1] == 1 or mask.is_meta or is_on_host(mask.device):
        return mask, None
    lengths = mask.sum(dim=1).cpu()
    if not torch.compiler.is_compiling() and set(lengths.tolist()) == {mask.shape[1]}:
        return None, None
    return mask, lengths


def is_fused(inputs: torch.Tensor, mask: torch.Tensor | None, lstm: "Lstm | LstmWeights") -> bool:
    """Return whether torch has a fused kernel: on a GPU, and on a CPU for float32 without padding and projection."""
    if inputs.device.type != "cpu":
        return True
    if torch.is_autocast_enabled("cpu") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # autocast would compute it in bfloat16
    return mask is None and lstm.weight_hr is None and inputs.dtype == torch.float32 and inputs.shape[1] > 1


def run_fused(inputs, mask, h, c, directions, training, lengths=None):
    """Compute `run_lstm` with torch's kernel for the device (oneDNN or cuDNN); padding becomes packed sequences."""
    if mask is not None and inputs.shape[1] == 1:
        # A single position does not need packing, and so avoids a host read.
        output, last_h, last_c = run_fused(inputs, None, h, c, directions, training)
        return output * mask[..., None], torch.where(mask, last_h, h), torch.where(mask, last_c, c)
    if uses_cudnn(inputs.device):
        weights = [(lstm.weight_ih, lstm.weight_hh, lstm.bias, lstm.weight_hr) for lstm in directions]
        weights = [weight for direction in weights for weight in direction if weight is not None]
        return cudnn_lstm(inputs, mask, lengths, h, c, weights)
    weights = []
    for lstm in directions:
        # The kernels expect two bias vectors; the paper's parameter counts have one.
        weights += [lstm.weight_ih, lstm.weight_hh, lstm.bias, torch.zeros_like(lstm.bias)]
        weights += [] if lstm.weight_hr is None else [lstm.weight_hr]
    options = (True, 1, 0.0, training, len(h) == 2)  # biases, layers, dropout, training, bidirectional
    if mask is None:
        return torch._VF.lstm(inputs, (h, c), weights, *options, True)
    rows = OrderedRows(inputs, mask, lengths)
    states = tuple(rows.states(h, c))
    data, last_h, last_c = torch._VF.lstm(rows.data, rows.packed.batch_sizes, states, weights, *options)
    return rows.unpack(data), rows.unsorted(last_h, h), rows.unsorted(last_c, c)


class Lstm(nn.Module):
    """The weights of an LSTM in one direction.

    If `lstm_hidden_size` differs from `hidden_size`, the cell has `lstm_hidden_size` units, and its output is
    projected to width D, also for the recurrence (Sak et al., 2014).

    Args:
        config: has hidden_size D and lstm_hidden_size U (None: D).
        input_size: I; None: D.

    Parameters: weight_ih (4U, I), weight_hh (4U, D), bias (4U,), and weight_hr (D, U) if U != D; the gates are
    stacked in torch's order: input, forget, cell, output.
    """

    def __init__(self, config: MoeConfig, input_size: int | None = None):
        super().__init__()
        self.width = config.hidden_size
        self.units = config.lstm_hidden_size or self.width
        self.weight_ih = nn.Parameter(torch.empty(4 * self.units, input_size or self.width))
        self.weight_hh = nn.Parameter(torch.empty(4 * self.units, self.width))
        self.bias = nn.Parameter(torch.empty(4 * self.units))
        self.weight_hr = nn.Parameter(torch.empty(self.width, self.units)) if self.units != self.width else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as torch.nn.LSTM (variance 1 / (3 * units)); the forget gate starts open (Jozefowicz, 2015)."""
        bound = self.units**-0.5
        init.uniform_(self.weight_ih, -bound, bound)
        init.uniform_(self.weight_hh, -bound, bound)
        bias = torch.zeros_like(self.bias)
        bias[self.units : 2 * self.units] = 1.0
        init.copy_(self.bias, bias)
        if self.weight_hr is not None:
            init.uniform_(self.weight_hr, -bound, bound)

    def forward(self, inputs: torch.Tensor) -> tuple[LstmWeights, torch.Tensor, torch.Tensor]:
        """Return the weights and the initial state, for a module that runs several LSTMs at once.

        Such a module calls this method instead of reading the weights: offloading loads a module's weights, and an
        adapter changes them, only when the module is called.
        """
        return LstmWeights(self.weight_ih, self.weight_hh, self.bias, self.weight_hr), *self.start(inputs, None, None)

    def start(
        self, inputs: torch.Tensor, h: torch.Tensor | None, c: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the initial state: zeros (B, D) and (B, U), unless a state is given."""
        if h is None:
            return inputs.new_zeros(len(inputs), self.width), inputs.new_zeros(len(inputs), self.units)
        if len(h) != len(inputs):
            # torch would broadcast some of these shapes and return the result of another batch.
            raise ValueError(f"h has {len(h)} rows, hidden_states has {len(inputs)}")
        return h, c


class LstmLayer(GradientCheckpointingLayer, Lstm):
    """x + dropout(LSTM(x)). Padding is skipped: it does not change the state or the output of other positions.

    Args:
        config: as for `Lstm`, and dropout.
        input_size: I; None: D.
    """

    def __init__(self, config: MoeConfig, input_size: int | None = None):
        super().__init__(config, input_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        h: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        documents: DocumentLanes | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (B, S, D), to which the output is added.
            mask: (B, S) bool, False for padding at any position; None without padding.
            h: (B, D), the output before the first position; None for zeros.
            c: (B, U), the cell before the first position; None for zeros.
            inputs: (B, S, I), the input of the LSTM; None: hidden_states.
            documents: the documents of packed rows, each of which starts from a zero state; None: each row is one
                document.
            lengths: see `row_lengths`.

        Returns:
            hidden_states (B, S, D), and the state after each row's last real position, in the dtype of hidden_states.
            With `documents`, the states belong to lanes, and are not meaningful to a caller.
        """
        inputs = hidden_states if inputs is None else inputs
        if documents is not None:
            lanes = documents.to_lanes(inputs)
            h, c = self.start(lanes, None, None)
            how = (self.training, documents.starts_NL, documents.lengths_N)
            output, h, c = run_lstm(lanes, documents.mask_NL, h[None], c[None], [self], *how)
            output = documents.to_rows(output)
            output = output if mask is None else output * mask[..., None]
            return hidden_states + self.dropout(output), h[0], c[0]
        h, c = self.start(hidden_states, h, c)
        output, h, c = run_lstm(inputs, mask, h[None], c[None], [self], self.training, lengths=lengths)
        # Autocast would leave all or part of the state in low precision.
        return hidden_states + self.dropout(output), h[0].to(hidden_states.dtype), c[0].to(hidden_states.dtype)
