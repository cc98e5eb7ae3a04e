"""Hierarchical gating: a primary gate over groups of experts, and a secondary gate inside each group (appendix B).

Shape suffixes: T tokens, D width, G groups, M experts of a group, E = G * M experts, K experts per token, P groups per
token, Q = K / P experts per chosen group, R rows. A row is a pair (token, chosen group); rows are sorted by group.
"""

import torch
from torch import nn
from transformers import initialization as init

from .balancing import importance, tokens_per_expert
from .gating import GateOutput, NoisyTopKGate, check_top_k, noisy_top_k, reset_gate
from .grouped_linear import grouped_linear
from .host_reads import host_reads_are_free


class HierarchicalGate(nn.Module):
    """Noisy top-k gating on two levels: G(x)_ij = G_primary(x)_i G_i(x)_j, for expert number i * M + j.

    A secondary gate is computed only for the tokens of its group, so a token costs G + P * M logits instead of E.

    Args:
        hidden_size: D.
        num_experts: E, over all groups.
        num_experts_per_tok: K, over all groups; a multiple of P.
        num_expert_groups: G, a divisor of E.
        num_groups_per_tok: P, at most G.
        noise_epsilon: as for `NoisyTopKGate`, for both levels.
        gate_std: as for `NoisyTopKGate`, for both levels.

    Parameters: primary.weight and primary.noise_weight (G, D), weight and noise_weight (G, M, D).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        num_expert_groups: int,
        num_groups_per_tok: int = 2,
        noise_epsilon: float = 1e-2,
        gate_std: float = 0.0,
    ):
        super().__init__()
        if num_experts % num_expert_groups:
            raise ValueError(f"num_expert_groups={num_expert_groups} does not divide num_experts={num_experts}")
        self.primary = NoisyTopKGate(
            hidden_size,
            num_expert_groups,
            num_groups_per_tok,
            noise_epsilon,
            gate_std,
            names=("num_expert_groups", "num_groups_per_tok"),
        )
        if num_experts_per_tok % num_groups_per_tok:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must be a multiple of num_groups_per_tok="
                f"{num_groups_per_tok}"
            )
        self.num_experts = num_experts
        self.num_experts_per_group = num_experts // num_expert_groups
        self.num_experts_per_tok = num_experts_per_tok
        self.num_chosen_per_group = num_experts_per_tok // num_groups_per_tok
        names = ("num_experts / num_expert_groups", "num_experts_per_tok / num_groups_per_tok")
        check_top_k(self.num_experts_per_group, self.num_chosen_per_group, names)
        self.noise_epsilon = noise_epsilon
        self.gate_std = gate_std
        shape = (num_expert_groups, self.num_experts_per_group, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.noise_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both matrices of the secondary gates as `NoisyTopKGate` does; the primary gate does so itself."""
        reset_gate(self.weight, self.gate_std)
        init.zeros_(self.noise_weight)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> GateOutput:
        """Route tokens; arguments are as for `NoisyTopKGate`. `router_logits` are the primary gate's logits (T, G)."""
        primary = self.primary(hidden_states, mask, output_statistics)
        order_R, group_R, ends_G = self._rows_by_group(primary)
        rows_RD = hidden_states.index_select(0, order_R // primary.top_k_index.shape[-1])
        clean_RM = self._secondary(rows_RD, self.weight, ends_G)
        stddev_RM = None
        if self.training:
            raw_stddev_RM = self._secondary(rows_RD, self.noise_weight, ends_G)
            stddev_RM = nn.functional.softplus(raw_stddev_RM) + self.noise_epsilon
        index_RQ, weights_RQ, probability_RM = noisy_top_k(
            clean_RM, stddev_RM, self.num_chosen_per_group, need_probability=output_statistics
        )

        weights_RQ = primary.top_k_weights.reshape(-1).index_select(0, order_R)[:, None] * weights_RQ
        is_unused_R1 = (group_R == len(self.weight))[:, None]
        index_RQ = (group_R[:, None] * self.num_experts_per_group + index_RQ).masked_fill(is_unused_R1, 0)
        top_k_index, top_k_weights = self._per_token(order_R, index_RQ, weights_RQ, len(hidden_states))
        if not output_statistics:
            return GateOutput(top_k_index, top_k_weights, primary.router_logits)
        importance_E = importance(top_k_index, top_k_weights, self.num_experts)
        counts_E = tokens_per_expert(top_k_index, top_k_weights, self.num_experts)
        load_E = self._load(primary, group_R, probability_RM, counts_E) if self.training else counts_E
        return GateOutput(top_k_index, top_k_weights, primary.router_logits, importance_E, load_E, counts_E)

    def _rows_by_group(self, primary: GateOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the (token, group) pairs: place in T * P (R,), group (R,), and the end of each group's rows (G,).

        Pairs with G_primary(x)_i = 0, such as all pairs of padding, are unused. They get group G and come last. If a
        host read is free, they are removed.
        """
        num_groups = len(self.weight)
        used = primary.top_k_weights.reshape(-1) > 0
        group = primary.top_k_index.reshape(-1).masked_fill(~used, num_groups)
        order_R = group.argsort(stable=True)
        group_R = group.index_select(0, order_R)
        ends_G = torch.searchsorted(group_R, torch.arange(num_groups, device=group.device), right=True)
        if host_reads_are_free(group.device):
            num_used = int(ends_G[-1])
            order_R, group_R = order_R[:num_used], group_R[:num_used]
        return order_R, group_R, ends_G

    @staticmethod
    def _secondary(rows_RD: torch.Tensor, weight: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
        """Return (R, M) in at least float32: each row times the matrix of its group, 0 for an unused row."""
        dtype = torch.promote_types(rows_RD.dtype, torch.float32)
        return grouped_linear(rows_RD.to(dtype), weight.to(dtype), ends_G)

    def _per_token(
        self, order_R: torch.Tensor, index_RQ: torch.Tensor, weights_RQ: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (T, K) ids and weights, the highest weight first; slots of unused pairs have id 0 and weight 0."""
        k, per_group = self.num_experts_per_tok, self.num_chosen_per_group
        pairs = (num_tokens * k // per_group, per_group)
        index_TK = index_RQ.new_zeros(pairs).index_copy(0, order_R, index_RQ).view(num_tokens, k)
        weights_TK = weights_RQ.new_zeros(pairs).index_copy(0, order_R, weights_RQ).view(num_tokens, k)
        weights_TK, rank_TK = weights_TK.sort(dim=-1, descending=True, stable=True)
        return index_TK.gather(1, rank_TK), weights_TK

    def _load(
        self,
        primary: GateOutput,
        group_R: torch.Tensor,
        probability_RM: torch.Tensor | None,
        counts_E: torch.Tensor,
    ) -> torch.Tensor:
        """Return Load_H(X)_ij = Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)|, (E,); 0 for a group without tokens."""
        load_GM = counts_E.view(len(self.weight), -1)
        if probability_RM is not None:
            # An extra row for the unused pairs.
            load_GM = load_GM.new_zeros(len(load_GM) + 1, load_GM.shape[1]).index_add(0, group_R, probability_RM)[:-1]
        group_size_G = primary.tokens_per_expert.clamp_min(1)
        return ((primary.load / group_size_G)[:, None] * load_GM).view(-1)
