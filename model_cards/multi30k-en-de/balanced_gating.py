"""Strictly balanced gating: every expert gets the same number of tokens (appendix F).

Shape suffixes: T tokens, D width, E experts, K slots per token.
"""

import torch
from torch import nn
from transformers import initialization as init

from .balancing import importance
from .gating import GateOutput, linear_in_float32
from .host_reads import host_reads_are_free


def tokens_for_each_expert(
    num_tokens: int | torch.Tensor, num_experts: int, num_experts_per_tok: int
) -> int | torch.Tensor:
    """Return m = k B / n, rounded to the nearest integer (halves up), between 1 and B.

    If B is a tensor, m is a tensor too.
    """
    nearest = (2 * num_experts_per_tok * num_tokens + num_experts) // (2 * num_experts)
    if isinstance(nearest, torch.Tensor):
        return nearest.clamp(min=1).minimum(num_tokens)
    return min(max(nearest, 1), num_tokens)


def batchwise_mask(
    gates: torch.Tensor, m: int | torch.Tensor, is_token: torch.Tensor, most: int | None = None
) -> torch.Tensor:
    """Return M_batchwise(X, m) (appendix F): each expert keeps its m highest values over the tokens of the batch.

    Among equal values, the earlier token is kept. Padding has no influence, because only real tokens are ranked.

    Args:
        gates: (T, E), G_sigma(x); not negative.
        m: number of tokens per expert, at most the number of real tokens. With `most`, m may be a tensor (1,), which
            the host does not read.
        is_token: (T, 1) bool, False for padding.
        most: an upper bound of `m`; None: `m` itself.

    Returns:
        (T, E) bool, m times True in each column.
    """
    most = m if most is None else most
    if most == 0:
        return torch.zeros_like(gates, dtype=torch.bool)
    # A value above the m-th highest passes; equal values pass in batch order. This avoids a sort of all T values.
    gates = gates.detach().masked_fill(~is_token, -1)
    highest_ME = gates.topk(most, dim=0).values
    last_kept_E = highest_ME[-1] if isinstance(m, int) else highest_ME.index_select(0, (m - 1).clamp(min=0))[0]
    above_TE, equal_TE = gates > last_kept_E, gates == last_kept_E
    places_left_E = m - above_TE.sum(dim=0)
    return above_TE | (equal_TE & (equal_TE.cumsum(dim=0) <= places_left_E))


def threshold_mask(gates: torch.Tensor, threshold: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Return M_threshold (T, E) bool: G_sigma(x)_i > T_i, independently for each token."""
    return (gates.detach() > threshold.detach()) & is_token


def batchwise_loss(
    gates: torch.Tensor, threshold: torch.Tensor, by_threshold: torch.Tensor, by_batch: torch.Tensor
) -> torch.Tensor:
    """Return L_batchwise(X, T, m) (appendix F), which trains the thresholds to reproduce the batchwise mask.

    L = sum_j sum_i (M_threshold(x_j, T)_i - M_batchwise(X, m)_ji) * (G_sigma(x_j)_i - T_i). L is not negative, and 0
    where both masks agree. The gradient flows to G_sigma and T; the masks are constants.

    Args:
        gates: (T, E), G_sigma(x).
        threshold: (E,), T.
        by_threshold: (T, E) bool, M_threshold, False for padding.
        by_batch: (T, E) bool, M_batchwise, False for padding.

    Returns:
        a scalar, the sum over tokens and experts.
    """
    disagreement_TE = by_threshold.to(gates.dtype) - by_batch.to(gates.dtype)
    return (disagreement_TE * (gates - threshold)).sum()


class StrictlyBalancedGate(nn.Module):
    """G(x)_i = G_sigma(x)_i M_i / sum_j G_sigma(x)_j M_j, with G_sigma(x) = softmax(x W_g) (appendix F).

    While training, M is the batchwise mask: each expert keeps its m = k B / n best tokens among the B tokens of the
    batch. A token gets k experts on average. It may get more than k, or none; then all its weights are 0. In
    evaluation, a token must not depend on other tokens, so M_i is G_sigma(x)_i > T_i. `batchwise_loss` trains the
    thresholds T to agree with the batchwise mask. Only the batchwise mask distinguishes equal tokens, which are
    frequent in a MoE layer directly above the embedding.

    W_g starts small, not at zero: with equal values, every expert would keep the same first m tokens of the batch.
    T starts at 1 / E, the mean of G_sigma. This start is slightly too low, because L_batchwise has a larger gradient
    on a threshold that passes too many tokens than on one that passes none. Weight decay lowers T, which gives more
    experts per token.

    Args:
        hidden_size: D.
        num_experts: E, n in the paper.
        num_experts_per_tok: k, the mean number of experts per token, at most E.

    Parameters: weight (E, D), threshold (E,).
    """

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int):
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must lie between 1 and num_experts={num_experts}"
            )
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.threshold = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise W_g just large enough to break ties: its scale does not change the ranking of the tokens."""
        init.normal_(self.weight, std=0.01)
        init.constant_(self.threshold, 1 / self.num_experts)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> GateOutput:
        """Route tokens.

        Args:
            hidden_states: (T, D).
            mask: (T,) bool, False for padding, which does not use experts and is not counted.
            output_statistics: also compute importance, the token counts and the threshold loss.

        Returns:
            The gate's decision. K is the largest number of experts of a token in this batch, at least 1. On a device,
            that number would need a host read, so K = E, with the experts in order. The load is the token counts:
            while training, m for each expert. The threshold loss is L_batchwise per real token, in training and
            evaluation.
        """
        reads = host_reads_are_free(hidden_states.device)
        logits_TE = linear_in_float32(hidden_states, self.weight)
        gates_TE = logits_TE.softmax(dim=-1)
        threshold_E = self.threshold.to(gates_TE.dtype)
        is_token_T1 = (
            logits_TE.new_ones((len(logits_TE), 1), dtype=torch.bool) if mask is None else mask.bool()[:, None]
        )
        if self.training or output_statistics:
            num_tokens = len(logits_TE)
            if mask is not None:
                num_tokens = is_token_T1.sum(dim=0)
                num_tokens = int(num_tokens) if reads else num_tokens
            by_batch_TE, most = self.choose_by_batch(gates_TE, is_token_T1, num_tokens)
        if not self.training or output_statistics:
            by_threshold_TE = threshold_mask(gates_TE, threshold_E, is_token_T1)

        chosen_TE = by_batch_TE if self.training else by_threshold_TE
        top_k_index, top_k_weights = self._slots(logits_TE, chosen_TE)
        most_per_expert = None
        if self.training and not reads:
            most_per_expert = most
        elif logits_TE.is_meta:  # where all tokens may reach a threshold, as nothing is known
            most_per_expert = len(logits_TE)
        output = GateOutput(top_k_index, top_k_weights, logits_TE, most_per_expert=most_per_expert)
        if not output_statistics:
            return output
        counts_E = chosen_TE.sum(dim=0).to(top_k_weights.dtype)
        importance_E = importance(top_k_index, top_k_weights, self.num_experts) if reads else top_k_weights.sum(dim=0)
        loss = batchwise_loss(gates_TE, threshold_E, by_threshold_TE, by_batch_TE)
        loss = loss / (max(num_tokens, 1) if isinstance(num_tokens, int) else num_tokens[0].clamp(min=1))
        return output._replace(importance=importance_E, load=counts_E, tokens_per_expert=counts_E, threshold_loss=loss)

    def choose_by_batch(
        self, gates_TE: torch.Tensor, is_token_T1: torch.Tensor, num_tokens: int | torch.Tensor
    ) -> tuple[torch.Tensor, int | None]:
        """Return M_batchwise over the tokens of this call. `distributed/global_batch.py` replaces this method.

        Args:
            gates_TE: (T, E), G_sigma(x).
            is_token_T1: (T, 1) bool, False for padding.
            num_tokens: the number of real tokens; a number, or a tensor (1,).

        Returns:
            (T, E) bool, and an upper bound of an expert's tokens; None if the bound would need a host read.
        """
        sizes = self.num_experts, self.num_experts_per_tok
        m, most = tokens_for_each_expert(num_tokens, *sizes), tokens_for_each_expert(len(gates_TE), *sizes)
        if isinstance(m, int):
            return batchwise_mask(gates_TE, m, is_token_T1), m
        return batchwise_mask(gates_TE, m, is_token_T1, most), most

    @staticmethod
    def _slots(logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (T, K) ids and weights; an unused slot has a valid id and weight 0.

        The highest weight comes first, except on a device, where all experts are in order.
        """
        # G_sigma renormalised over the chosen experts equals a softmax over only these, which cannot become 0 / 0.
        lowest = torch.finfo(logits_TE.dtype).min
        weights_TE = logits_TE.masked_fill(~chosen_TE, lowest).softmax(dim=-1).masked_fill(~chosen_TE, 0)
        if not host_reads_are_free(logits_TE.device):
            return torch.arange(weights_TE.shape[1], device=weights_TE.device).expand_as(weights_TE), weights_TE
        num_slots = int(chosen_TE.sum(dim=-1).max()) if len(chosen_TE) else 0
        top_k_weights, top_k_index = weights_TE.topk(max(num_slots, 1), dim=-1)
        return top_k_index, top_k_weights
