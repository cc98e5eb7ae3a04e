"""The layers that only the translation model has: its attention, and the first layer of encoder and decoder.

The encoder's first LSTM reads the source in both directions (GNMT, section 3.2). The decoder's first LSTM queries the
attention (GNMT, section 3; appendices E and G).

Shape suffixes: B batch, S source length, T target length, D width, A size of the attention's hidden layer (= D),
U units of an LSTM's cell.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gnmt_moe import GnmtMoeConfig
from .lstm import Lstm, LstmLayer, float_weights, lstm_cell, run_lstm
from .quantization import is_int8, linear

# With at least this many target positions, the decoder's step is compiled on CUDA. Not measured yet.
COMPILED_POSITIONS = 8


class BidirectionalLstmLayer(GradientCheckpointingLayer):
    """x + dropout(LSTM(x)) in each direction, both of width D.

    The paper does not say how the directions are merged, or where the residual connection goes. Here, each direction
    has a residual connection. A following LSTM reads the concatenation of both directions (2D), which gives the
    paper's operations per time step. Later residual connections add to the mean, x + (dropout(forward) +
    dropout(backward)) / 2.

    Args:
        config: as for `LstmLayer`, for each direction.

    Parameters: the parameters of an LSTM layer, under forward_lstm and under backward_lstm.
    """

    def __init__(self, config: GnmtMoeConfig):
        super().__init__()
        self.forward_lstm = Lstm(config)
        self.backward_lstm = Lstm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (B, S, D).
            mask: (B, S) bool, False for padding at any position; None without padding.
            lengths: see `row_lengths`.

        Returns:
            the mean of both directions (B, S, D), and their concatenation, the forward direction first (B, S, 2D).
        """
        directions, h, c = zip(self.forward_lstm(hidden_states), self.backward_lstm(hidden_states))
        states = torch.stack(h), torch.stack(c)
        output, _, _ = run_lstm(hidden_states, mask, *states, directions, self.training, lengths=lengths)
        both = torch.cat([hidden_states, hidden_states], dim=-1) + self.dropout(output)
        return torch.stack(both.chunk(2, dim=-1)).mean(dim=0), both


class GnmtAttention(nn.Module):
    """Attention: a network scores every source position x_i for every query y_j; a softmax over i gives the weights.

    - "product", the paper's: sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d). It is one matrix product of two tensors.
    - "additive", GNMT's: sum_d V_d tanh((x_i U)_d + (y_j W)_d). It needs memory for B * T * S * A numbers.

    The keys depend on the source alone and are computed once. The context is the weighted sum of the x_i.

    Args:
        config: has hidden_size D and attention_type.

    Parameters: source_weight (A, D), U; query_weight (A, D), W; score_weight (A,), V.
    """

    def __init__(self, config: GnmtMoeConfig):
        super().__init__()
        width = config.hidden_size
        self.is_product = config.attention_type == "product"
        self.source_weight = nn.Parameter(torch.empty(width, width))
        self.query_weight = nn.Parameter(torch.empty(width, width))
        self.score_weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise U and W to keep the variance, and V to 1 / A for products or at random for additive scores.

        With V = 1 / A, a score starts as a mean over d. With V = 1, the first scores would be large by chance, and the
        model would learn the alignment much later.
        """
        bound = self.source_weight.shape[1] ** -0.5
        init.normal_(self.source_weight, std=bound)
        init.normal_(self.query_weight, std=bound)
        if self.is_product:
            init.constant_(self.score_weight, 1 / len(self.score_weight))
        else:
            init.normal_(self.score_weight, std=bound)

    def project_source(self, source: torch.Tensor) -> torch.Tensor:
        """Return the keys (B, S, A) for a source (B, S, D): V tanh(x U) for products, otherwise x U."""
        keys_BSA = linear(source, self.source_weight)
        return torch.tanh(keys_BSA) * self.score_weight if self.is_product else keys_BSA

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor | None, source: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            query: (B, T, D).
            keys: (B, S, A), the keys that an earlier call returned for this source; None: computed here.
            source: (B, S, D).
            mask: (B, S) bool, False for padding, whose weight is exactly 0; None without padding.

        Returns:
            context (B, T, D), zero for a row whose source is all padding; weights (B, T, S), at least float32; keys.
        """
        if keys is None:
            keys = self.project_source(source)
        query_BTA = linear(query, self.query_weight)
        if self.is_product:
            scores_BTS = torch.bmm(torch.tanh(query_BTA), keys.to(query_BTA.dtype).transpose(1, 2))
        else:
            scores_BTS = torch.tanh(query_BTA[:, :, None] + keys[:, None]) @ self.score_weight
        scores_BTS = scores_BTS.to(torch.promote_types(scores_BTS.dtype, torch.float32))
        if mask is not None:
            scores_BTS = scores_BTS.masked_fill(~mask[:, None], torch.finfo(scores_BTS.dtype).min)
        weights_BTS = scores_BTS.softmax(dim=-1)
        if mask is not None:
            weights_BTS = weights_BTS * mask[:, None]
        return torch.bmm(weights_BTS.to(source.dtype), source), weights_BTS, keys


class DeepOutput(nn.Linear):
    """dropout(tanh(W [h, y, context] + b)): a deep output (Pascanu et al., 2014; Bahdanau et al., 2015).

    The softmax reads it instead of the top layer's output h. y is the embedding of the preceding target token. The
    paper's models do not have it.

    Args:
        config: has hidden_size D and dropout.

    Parameters: weight (D, 3D), W; bias (D,), b.
    """

    def __init__(self, config: GnmtMoeConfig):
        super().__init__(3 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise W to keep the variance, and b to zero."""
        init.normal_(self.weight, std=self.in_features**-0.5)
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor, embeddings: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: (B, T, D), the top layer's output.
            embeddings: (B, T, D), the bottom layer's input.
            context: (B, T, D), the attention's context.

        Returns:
            (B, T, D), in the dtype of hidden_states.
        """
        inputs = torch.cat([hidden_states, embeddings, context.to(hidden_states)], dim=-1)
        return self.dropout(torch.tanh(super().forward(inputs))).to(hidden_states.dtype)


def recurrent_projection(context_weight: torch.Tensor, weight_hh: torch.Tensor, num_steps: int) -> Callable:
    """Return a function (context, h) -> context_weight context + weight_hh h, for `num_steps` calls.

    For several steps, the weights are concatenated, so that a step takes one product. For a single step, that copy
    would cost more than a second product.
    """
    if num_steps == 1:
        return lambda context, h: nn.functional.linear(context, context_weight) + nn.functional.linear(h, weight_hh)
    both_weights = torch.cat([context_weight, weight_hh], dim=1)
    return lambda context, h: nn.functional.linear(torch.cat([context, h], dim=-1), both_weights)


class AttentionLstmLayer(LstmLayer):
    """x + dropout(LSTM(x)), and the attention context for every target position.

    The query is h, the LSTM's output before dropout and residual sum. `attention_feeding` says what the LSTM reads,
    and which context the layers above get:

    - "recurrent": the LSTM reads [x_t, context_t] with context_t = attend(h_{t-1}), and h is zero before the first
      step. The layer runs step by step. Values that do not depend on the previous step are computed for all steps at
      once.
    - "input": the LSTM reads the same input. The layers above get attend(h_t), whose query has already read x_t (Luong
      et al., 2015, section 3.3).
    - "parallel": the LSTM reads only x_t, in one call for all steps, and context_t = attend(h_t).

    Args:
        config: as for `LstmLayer` and `GnmtAttention`, and attention_feeding.

    Parameters: the parameters of an LSTM layer, with weight_ih (4U, 2D) unless feeding is parallel, and attention.*.
    """

    def __init__(self, config: GnmtMoeConfig):
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
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states: (B, T, D).
            source: (B, S, D), the encoder's output.
            keys: (B, S, D), the keys that an earlier call returned for this source; None: computed here.
            source_mask: (B, S) bool, False for source padding; None without padding.
            mask: (B, T) bool, False for target padding; None without padding.
            h: (B, D), the output before the first position; None for zeros.
            c: (B, U), the cell before the first position; None for zeros.
            lengths: lengths of the target, see `row_lengths`.

        Returns:
            hidden_states (B, T, D), context (B, T, D), attention weights (B, 1, T, S), h, c and keys.
        """
        h, c = self.start(hidden_states, h, c)
        inputs = (hidden_states, source, keys, source_mask, mask, h, c)
        run = self._run_step_by_step(*inputs) if self.self_feeding else self._run_at_once(*inputs, lengths)
        output, context, weights, h, c, keys = run
        dtype = hidden_states.dtype  # autocast would leave all or part of the state in low precision
        hidden_states = hidden_states + self.dropout(output)
        return hidden_states, context, weights[:, None], h.to(dtype), c.to(dtype), keys

    def _run_at_once(self, hidden_states, source, keys, source_mask, mask, h, c, lengths):
        output, h, c = run_lstm(hidden_states, mask, h[None], c[None], [self], self.training, lengths=lengths)
        context, weights, keys = self.attention(output, keys, source, source_mask)
        return output, context, weights, h[0], c[0], keys

    def _run_step_by_step(self, hidden_states, source, keys, source_mask, mask, h, c):
        width = hidden_states.shape[-1]
        if hidden_states.shape[1] == 1 and is_int8(self.weight_ih):
            # Multiplying x separately would need a copy of some columns, so x is multiplied together with the context.
            lstm, from_x, x = self, (self.bias,), hidden_states[:, 0]

            def project(context, h):
                return linear(torch.cat([x, context], dim=-1), lstm.weight_ih) + linear(h, lstm.weight_hh)
        else:
            lstm = float_weights(self)
            from_x = nn.functional.linear(hidden_states, lstm.weight_ih[:, :width], lstm.bias).unbind(1)
            project = recurrent_projection(lstm.weight_ih[:, width:], lstm.weight_hh, num_steps=len(from_x))
        is_real = [None] * len(from_x) if mask is None else mask[..., None].unbind(1)
        compiled_step = self._compiled_step(hidden_states)
        outputs, contexts, all_weights = [], [], []
        for gates_x, is_real_B1 in zip(from_x, is_real):
            step = self._step if keys is None else compiled_step  # one graph serves every position that has keys
            output, context, weights, h, c, keys = step(
                gates_x, project, lstm.weight_hr, h, c, keys, source, source_mask, is_real_B1
            )
            outputs.append(output[:, None])
            contexts.append(context)
            all_weights.append(weights)
        if self.attends_after_step:
            context, weights, keys = self.attention(h[:, None], keys, source, source_mask)
            contexts, all_weights = [*contexts[1:], context], [*all_weights[1:], weights]
        return *(torch.cat(steps, dim=1) for steps in (outputs, contexts, all_weights)), h, c, keys

    def _step(self, gates_x, project, weight_hr, h, c, keys, source, source_mask, is_real_B1):
        """Compute one target position of recurrent or input feeding.

        `gates_x` (B, 4U) is the part of the gates from x, and `project` computes the part from context and h.
        `weight_hr` is None if D = U. `is_real_B1` is False for padding, and None without padding. Returns output (B,
        D), context (B, 1, D), attention weights (B, 1, S), h, c and keys.
        """
        context, weights, keys = self.attention(h[:, None], keys, source, source_mask)
        new_h, new_c = lstm_cell(gates_x + project(context[:, 0].to(h.dtype), h), c, weight_hr)
        output = new_h = new_h.to(h.dtype)
        new_c = new_c.to(c.dtype)
        if is_real_B1 is not None:
            output = output * is_real_B1
            new_h, new_c = torch.where(is_real_B1, new_h, h), torch.where(is_real_B1, new_c, c)
        return output, context, weights, new_h, new_c, keys

    def _compiled_step(self, hidden_states: torch.Tensor) -> Callable:
        """Return `_step`, compiled on CUDA for many positions: at most 12 launches per position instead of about 50.

        The first other length or batch compiles once more, for all sizes. torch's `TORCH_COMPILE_DISABLE=1` turns
        compilation off.
        """
        is_compiled = hidden_states.device.type == "cuda" and hidden_states.shape[1] >= COMPILED_POSITIONS
        if not is_compiled or torch.compiler.is_compiling() or not has_triton():
            return self._step
        return torch.compile(self._step)
