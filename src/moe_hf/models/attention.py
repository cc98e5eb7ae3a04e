"""The attention of the translation models (appendix G).

Shape suffixes: B batch, S source length, T target length, D width, A size of the hidden layer (= D).
"""

import torch
from torch import nn
from transformers import initialization as init

from .quantization import linear


class GnmtAttention(nn.Module):
    """A feed-forward network scores every source position x_i for every query y_j; a softmax over i makes weights.

    "product", the paper's:  sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d), which is one matrix product of two tensors;
    "additive", GNMT's:      sum_d V_d tanh((x_i U)_d + (y_j W)_d), which needs memory for B * T * S * A numbers.
    What depends on the source alone, the keys, is computed once. The context is the weighted sum of the x_i.

    Args:
        config: hidden_size D, attention_type.

    Parameters: source_weight (A, D), U; query_weight (A, D), W; score_weight (A,), V.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.is_product = config.attention_type == "product"
        self.source_weight = nn.Parameter(torch.empty(width, width))
        self.query_weight = nn.Parameter(torch.empty(width, width))
        self.score_weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U and W keep the variance. Product: V = 1 / A, so the score starts as a mean over d; additive: V is random.

        With V = 1 the first sums over d are as large as chance makes them, and alignment is learnt far later.
        """
        bound = self.source_weight.shape[1] ** -0.5
        init.normal_(self.source_weight, std=bound)
        init.normal_(self.query_weight, std=bound)
        if self.is_product:
            init.constant_(self.score_weight, 1 / len(self.score_weight))
        else:
            init.normal_(self.score_weight, std=bound)

    def project_source(self, source: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> the keys (B, S, A): V tanh(x U) for products, else x U."""
        keys_BSA = linear(source, self.source_weight)
        return torch.tanh(keys_BSA) * self.score_weight if self.is_product else keys_BSA

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor | None, source: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            query: (B, T, D).
            keys: (B, S, A), what an earlier call returned for this source; None: computed here.
            source: (B, S, D).
            mask: (B, S) bool, False for padding, whose weight is exactly 0; None when there is none.

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
