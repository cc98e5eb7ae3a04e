"""The encoder's first layer: two LSTMs that read the source in opposite directions (GNMT, section 3.2).

Shape suffixes: B batch, S sequence, D width (hidden_size).
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .lstm import Lstm, run_lstm


class BidirectionalLstmLayer(GradientCheckpointingLayer):
    """x + dropout(LSTM(x)) in each direction, both of width D.

    The paper says neither how the directions are merged nor where the residual goes. Here each direction has its own
    residual; a following LSTM reads both, concatenated to 2D, which gives the paper's operations per time step; and
    the stream that later residuals add to is their mean, x + (dropout(forward) + dropout(backward)) / 2.

    Args:
        config: as for `LstmLayer`, for each direction.

    Parameters: those of an LSTM layer under forward_lstm and backward_lstm.
    """

    def __init__(self, config):
        super().__init__()
        self.forward_lstm = Lstm(config)
        self.backward_lstm = Lstm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (B, S, D).
            mask: (B, S) bool, False for padding, which may stand anywhere; None when there is none.

        Returns:
            the mean of both directions (B, S, D), and both, the forward one first (B, S, 2D).
        """
        directions, h, c = zip(self.forward_lstm(hidden_states), self.backward_lstm(hidden_states))
        output, _, _ = run_lstm(hidden_states, mask, torch.stack(h), torch.stack(c), directions, self.training)
        both = torch.cat([hidden_states, hidden_states], dim=-1) + self.dropout(output)
        return torch.stack(both.chunk(2, dim=-1)).mean(dim=0), both
