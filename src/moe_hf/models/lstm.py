"""One LSTM layer with residual connection, dropout and optional recurrent projection (appendix C).

Shape suffixes: B batch, S sequence, D width (hidden_size), U units of the cell.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer


class LstmLayer(GradientCheckpointingLayer):
    """x + dropout(LSTM(x)). Padding is skipped: it changes neither another position's output nor the state.

    With `lstm_hidden_size` != `hidden_size` the cell has that many units and its output is projected to width D,
    also for the recurrence (Sak et al., 2014).

    Args:
        config: hidden_size D, lstm_hidden_size U (None: D), dropout.

    Parameters: weight_ih (4U, D), weight_hh (4U, D), bias (4U,), and weight_hr (D, U) if U != D; the gates are
    stacked in torch's order: input, forget, cell, output.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.units = config.lstm_hidden_size or width
        self.weight_ih = nn.Parameter(torch.empty(4 * self.units, width))
        self.weight_hh = nn.Parameter(torch.empty(4 * self.units, width))
        self.bias = nn.Parameter(torch.empty(4 * self.units))
        self.weight_hr = nn.Parameter(torch.empty(width, self.units)) if self.units != width else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform with variance 1 / (3 * units), as torch.nn.LSTM; the forget gate starts open (Jozefowicz, 2015)."""
        bound = self.units**-0.5
        init.uniform_(self.weight_ih, -bound, bound)
        init.uniform_(self.weight_hh, -bound, bound)
        bias = torch.zeros_like(self.bias)
        bias[self.units : 2 * self.units] = 1.0
        init.copy_(self.bias, bias)
        if self.weight_hr is not None:
            init.uniform_(self.weight_hr, -bound, bound)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        h: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (B, S, D).
            mask: (B, S) bool, False for padding, which may stand anywhere; None when there is none.
            h, c: (B, D) and (B, U), the state before the first position; None for zeros.

        Returns:
            hidden_states (B, S, D), and the state after each row's last real position, in the dtype of hidden_states.
        """
        if h is None:
            h = hidden_states.new_zeros(hidden_states.shape[0], hidden_states.shape[-1])
            c = hidden_states.new_zeros(hidden_states.shape[0], self.units)
        elif h.shape[0] != hidden_states.shape[0]:
            # torch would broadcast some of these and answer for another batch.
            raise ValueError(f"h has {h.shape[0]} rows, hidden_states has {hidden_states.shape[0]}")
        if mask is None:
            output, h, c = self._run(hidden_states, h, c)
        else:
            output, h, c = self._run_padded(hidden_states, mask, h, c)
        # Autocast would leave the state in the lower precision, or only a part of it.
        return hidden_states + self.dropout(output), h.to(hidden_states.dtype), c.to(hidden_states.dtype)

    def _weights(self) -> list[torch.Tensor]:
        # torch's kernels expect two bias vectors; the paper's parameter counts have one.
        weights = [self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias)]
        return weights if self.weight_hr is None else [*weights, self.weight_hr]

    def _run(self, inputs, h, c):
        output, h, c = torch._VF.lstm(
            inputs, (h[None], c[None]), self._weights(), True, 1, 0.0, self.training, False, True
        )
        return output, h[0], c[0]

    def _run_padded(self, inputs, mask, h, c):
        lengths_B = mask.sum(dim=1)
        # Real positions first, in their order; a row without any is run for one step that is then forgotten.
        order_BS = mask.int().argsort(dim=1, descending=True, stable=True)
        packed = pack_padded_sequence(
            inputs.gather(1, order_BS[..., None].expand_as(inputs)),
            lengths_B.clamp_min(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        data, batch_sizes, sorted_B, unsorted_B = packed
        state = (h[None, sorted_B], c[None, sorted_B])
        data, last_h, last_c = torch._VF.lstm(
            data, batch_sizes, state, self._weights(), True, 1, 0.0, self.training, False
        )
        output, _ = pad_packed_sequence(
            PackedSequence(data, batch_sizes, sorted_B, unsorted_B), batch_first=True, total_length=inputs.shape[1]
        )
        output = output.gather(1, order_BS.argsort(dim=1)[..., None].expand_as(output))
        has_tokens_B1 = (lengths_B > 0)[:, None]
        h = torch.where(has_tokens_B1, last_h[0, unsorted_B], h)
        c = torch.where(has_tokens_B1, last_c[0, unsorted_B], c)
        return output * mask[..., None], h, c
