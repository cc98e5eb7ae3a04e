"""The mixture-of-experts block: gate, experts, sigmoid, dropout, residual (sections 2 and 3, appendix C).

Shape suffixes: B batch, S sequence, T = B * S tokens, D width, E experts.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .experts import MoeExperts
from .gating import NoisyTopKGate, SoftmaxTopKGate
from .hierarchical_gating import HierarchicalGate


def build_gate(config) -> nn.Module:
    """The gate that `config.gating` and `config.num_expert_groups` name."""
    sizes = (config.hidden_size, config.num_experts, config.num_experts_per_tok)
    if config.num_expert_groups is not None:
        return HierarchicalGate(*sizes, config.num_expert_groups, config.num_groups_per_tok, config.noise_epsilon)
    if config.gating == "noisy_top_k":
        return NoisyTopKGate(*sizes, noise_epsilon=config.noise_epsilon)
    return SoftmaxTopKGate(*sizes)  # for "softmax", K = E


class MoeBlock(GradientCheckpointingLayer):
    """x + dropout(sigmoid(sum_i G(x)_i E_i(x))), applied to all positions of all sequences at once.

    Args:
        config: see `LstmMoeConfig`; `gating` chooses the gate, `_experts_implementation` how experts are computed.
    """

    def __init__(self, config):
        super().__init__()
        self.gate = build_gate(config)
        self.experts = MoeExperts(config)
        self.dropout = nn.Dropout(config.dropout)
        self.recompute_experts = config.recompute_experts

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, need_balancing: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, S, D).
            mask: (B, S) bool, False for padding, which is neither routed nor counted.
            need_balancing: also report the balancing statistics.

        Returns:
            hidden_states (B, S, D), and importance, load and token counts, each (E,) or None. They are outputs, not
            attributes, so that recomputation in the backward pass neither loses their gradient nor counts them twice.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        routed = self.gate(hidden_TD, mask_T, need_balancing)
        output_TD = self._run_experts(hidden_TD, routed.top_k_index, routed.top_k_weights)
        output = torch.sigmoid(output_TD).view_as(hidden_states)
        hidden_states = hidden_states + self.dropout(output)
        return hidden_states, routed.importance, routed.load, routed.tokens_per_expert

    def _run_experts(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recompute_experts and torch.is_grad_enabled():
            # Nothing is random inside an expert, so that no random state need be kept.
            return checkpoint(self.experts, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.experts(*inputs)
