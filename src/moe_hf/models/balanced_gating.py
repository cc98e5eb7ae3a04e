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
    """m = k B / n: the nearest integer (a half goes up), at least 1, and at most B: no token is taken twice.

    Of B as a tensor m is one too.
    """
    nearest = (2 * num_experts_per_tok * num_tokens + num_experts) // (2 * num_experts)
    if isinstance(nearest, torch.Tensor):
        return nearest.clamp(min=1).minimum(num_tokens)
    return min(max(nearest, 1), num_tokens)


def batchwise_mask(
    gates: torch.Tensor, m: int | torch.Tensor, is_token: torch.Tensor, most: int | None = None
) -> torch.Tensor:
    """M_batchwise(X, m) (appendix F): each expert keeps its m highest values over the tokens of the batch.

    Among equal values the earlier token is kept. Only real tokens stand in line, so padding decides nothing.

    Args:
        gates: (T, E), G_sigma(x); not negative.
        m: at most the number of real tokens; a number, or with `most` a tensor (1,), which the host does not read.
        is_token: (T, 1) bool, False for padding.
        most: a number that `m` does not exceed; None: `m`.

    Returns:
        (T, E) bool, m times True in each column.
    """
    most = m if most is None else most
    if most == 0:
        return torch.zeros_like(gates, dtype=torch.bool)
    # The m-th highest value decides, and then the order in the batch among its equals. That takes no sort of all T.
    gates = gates.detach().masked_fill(~is_token, -1)
    highest_ME = gates.topk(most, dim=0).values
    last_kept_E = highest_ME[-1] if isinstance(m, int) else highest_ME.index_select(0, (m - 1).clamp(min=0))[0]
    above_TE, equal_TE = gates > last_kept_E, gates == last_kept_E
    places_left_E = m - above_TE.sum(dim=0)
    return above_TE | (equal_TE & (equal_TE.cumsum(dim=0) <= places_left_E))


def threshold_mask(gates: torch.Tensor, threshold: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """M_threshold(x, T)_i = 1 if G_sigma(x)_i > T_i, of each token alone: (T, E) bool."""
    return (gates.detach() > threshold.detach()) & is_token


def batchwise_loss(
    gates: torch.Tensor, threshold: torch.Tensor, by_threshold: torch.Tensor, by_batch: torch.Tensor
) -> torch.Tensor:
    """L_batchwise(X, T, m) (appendix F): it is 0 where the two masks agree, and teaches the thresholds to.

    sum_j sum_i (M_threshold(x_j, T)_i - M_batchwise(X, m)_ji) * (G_sigma(x_j)_i - T_i), not negative. The gradient
    goes to G_sigma and to T; the masks are constants.

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

    While training, M is the batchwise mask: each expert keeps its m = k B / n best of the batch's B tokens. A token
    goes to k experts on average; it may get none (then all its weights are 0) or more than k. In evaluation, where a
    token must not depend on the others, M_i is G_sigma(x)_i > T_i, with thresholds T that `batchwise_loss` trains to
    agree. Tokens that are equal (a MoE layer right on the embedding sees many) are told apart by the first mask only.

    W_g starts small, not at zero: with all values equal, every expert would keep the same first m tokens of the batch.
    T starts at 1 / E, the mean of G_sigma, which is a little too low: the gradient of L_batchwise is larger on a
    threshold that lets too many tokens pass than on one that lets none pass. Weight decay on T pulls it towards more
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
        """Break ties and no more: the ranking of the tokens does not depend on the scale of W_g."""
        init.normal_(self.weight, std=0.01)
        init.constant_(self.threshold, 1 / self.num_experts)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> GateOutput:
        """Route tokens.

        Args:
            hidden_states: (T, D).
            mask: (T,) bool, False for padding: such a token takes no expert's place and is not counted.
            output_statistics: also compute importance, the token counts and the threshold loss.

        Returns:
            K is the most experts that a token of this batch has, at least 1; on a device, where that number would be a
            host read, the slots of a token are all experts in their order. Load is the token counts, the same m for
            each expert while training. The threshold loss is L_batchwise per real token, in both modes.
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
        """M_batchwise, where the batch is this call's; who knows of more tokens may put theirs in place.

        Args:
            gates_TE: (T, E), G_sigma(x).
            is_token_T1: (T, 1) bool, False for padding.
            num_tokens: how many of the T are no padding; a number, or a tensor (1,).

        Returns:
            (T, E) bool, and at most how many tokens an expert has; None: not known without a host read.
        """
        sizes = self.num_experts, self.num_experts_per_tok
        m, most = tokens_for_each_expert(num_tokens, *sizes), tokens_for_each_expert(len(gates_TE), *sizes)
        if isinstance(m, int):
            return batchwise_mask(gates_TE, m, is_token_T1), m
        return batchwise_mask(gates_TE, m, is_token_T1, most), most

    @staticmethod
    def _slots(logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) ids and weights; an unused slot has some expert's id and weight 0.

        The highest weight comes first, but on a device all experts stand in their order.
        """
        # G_sigma renormalised over the chosen experts is the softmax over them alone, which cannot underflow to 0 / 0.
        lowest = torch.finfo(logits_TE.dtype).min
        weights_TE = logits_TE.masked_fill(~chosen_TE, lowest).softmax(dim=-1).masked_fill(~chosen_TE, 0)
        if not host_reads_are_free(logits_TE.device):
            return torch.arange(weights_TE.shape[1], device=weights_TE.device).expand_as(weights_TE), weights_TE
        num_slots = int(chosen_TE.sum(dim=-1).max()) if len(chosen_TE) else 0
        top_k_weights, top_k_index = weights_TE.topk(max(num_slots, 1), dim=-1)
        return top_k_index, top_k_weights
