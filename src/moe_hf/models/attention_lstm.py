"""The decoder's first layer: an LSTM whose output queries the attention (GNMT, section 3; appendices E and G).

Shape suffixes: B batch, S source length, T target length, D width, U units of the cell.
"""

from collections.abc import Callable

import torch
from torch import nn

from .attention import GnmtAttention
from .lstm import LstmLayer, float_weights, lstm_cell, run_lstm
from .quantization import is_int8, linear


def feedback(context_weight: torch.Tensor, weight_hh: torch.Tensor, num_steps: int) -> Callable:
    """(context, h) -> context_weight context + weight_hh h, to be called `num_steps` times.

    It is one product a step, with the weights side by side; for a single step that copy would cost more than a second.
    """
    if num_steps == 1:
        return lambda context, h: nn.functional.linear(context, context_weight) + nn.functional.linear(h, weight_hh)
    both_weights = torch.cat([context_weight, weight_hh], dim=1)
    return lambda context, h: nn.functional.linear(torch.cat([context, h], dim=-1), both_weights)


class AttentionLstmLayer(LstmLayer):
    """x + dropout(LSTM(x)), and the attention context for every target position.

    The query is h, the LSTM's output before dropout and residual sum.
    attention_feeding="recurrent": context_t = attend(h_{t-1}), and the LSTM reads [x_t, context_t]; h before the first
    step is zero. One step after the other; what does not depend on the step before is computed for all at once.
    attention_feeding="input": the LSTM reads the same, [x_t, attend(h_{t-1})], but context_t = attend(h_t): the layers
    above get what was looked for after x_t was read (Luong et al., 2015, section 3.3).
    attention_feeding="parallel": the LSTM reads x_t, in one call, and context_t = attend(h_t).

    Args:
        config: as for `LstmLayer` and `GnmtAttention`, and attention_feeding.

    Parameters: those of an LSTM layer, with weight_ih (4U, 2D) unless feeding is parallel, and attention.*.
    """

    def __init__(self, config):
        self_feeding = config.attention_feeding != "parallel"
        super().__init__(config, 2 * config.hidden_size if self_feeding else None)
        self.self_feeding = self_feeding
        self.attends_after_step = config.attention_feeding == "input"
        self.attention = GnmtAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor,
        keys: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        h: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states: (B, T, D).
            source: (B, S, D), the encoder's output.
            keys: (B, S, D), what an earlier call returned for this source; None: computed here.
            source_mask, mask: (B, S) and (B, T) bool, False for padding; None when there is none.
            h, c: (B, D) and (B, U), the state before the first position; None for zeros.

        Returns:
            hidden_states (B, T, D), context (B, T, D), attention weights (B, 1, T, S), h, c and keys.
        """
        h, c = self.start(hidden_states, h, c)
        if self.self_feeding:
            run = self._run_step_by_step
        else:
            run = self._run_at_once
        output, context, weights, h, c, keys = run(hidden_states, source, keys, source_mask, mask, h, c)
        dtype = hidden_states.dtype  # autocast would leave the state in the lower precision, or only a part of it
        hidden_states = hidden_states + self.dropout(output)
        return hidden_states, context, weights[:, None], h.to(dtype), c.to(dtype), keys

    def _run_at_once(self, hidden_states, source, keys, source_mask, mask, h, c):
        output, h, c = run_lstm(hidden_states, mask, h[None], c[None], [self], self.training)
        context, weights, keys = self.attention(output, keys, source, source_mask)
        return output, context, weights, h[0], c[0], keys

    def _run_step_by_step(self, hidden_states, source, keys, source_mask, mask, h, c):
        dtype, width = hidden_states.dtype, hidden_states.shape[-1]
        if hidden_states.shape[1] == 1 and is_int8(self.weight_ih):
            # A part of the columns would have to be copied, so x goes in together with what is fed back.
            lstm, from_x, x = self, (self.bias,), hidden_states[:, 0]

            def fed_back(context, h):
                return linear(torch.cat([x, context], dim=-1), lstm.weight_ih) + linear(h, lstm.weight_hh)
        else:
            lstm = float_weights(self)
            from_x = nn.functional.linear(hidden_states, lstm.weight_ih[:, :width], lstm.bias).unbind(1)
            fed_back = feedback(lstm.weight_ih[:, width:], lstm.weight_hh, num_steps=len(from_x))
        is_real = [None] * len(from_x) if mask is None else mask[..., None].unbind(1)
        outputs, contexts, all_weights = [], [], []
        for gates_x, is_real_B1 in zip(from_x, is_real):
            context, weights, keys = self.attention(h[:, None], keys, source, source_mask)
            new_h, new_c = lstm_cell(gates_x + fed_back(context[:, 0].to(h.dtype), h), c, lstm.weight_hr)
            new_h, new_c = new_h.to(dtype), new_c.to(dtype)
            output = new_h
            if is_real_B1 is not None:
                output = output * is_real_B1
                new_h, new_c = torch.where(is_real_B1, new_h, h), torch.where(is_real_B1, new_c, c)
            h, c = new_h, new_c
            outputs.append(output[:, None])
            contexts.append(context)
            all_weights.append(weights)
        if self.attends_after_step:
            context, weights, keys = self.attention(h[:, None], keys, source, source_mask)
            contexts, all_weights = [*contexts[1:], context], [*all_weights[1:], weights]
        return *(torch.cat(steps, dim=1) for steps in (outputs, contexts, all_weights)), h, c, keys
