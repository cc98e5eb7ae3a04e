"""The mixture-of-experts block: gate, experts, sigmoid, dropout, residual (sections 2 and 3, appendix C).

Shape suffixes: B batch, S sequence, T = B * S tokens, D width, E experts, K slots per token, R = used slots in all.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .balanced_gating import StrictlyBalancedGate
from .balancing import balancing_loss, cv_squared
from .configuration_moe import MoeConfig
from .experts import MoeExperts
from .experts_choice import with_experts_implementation
from .gating import GateOutput, NoisyTopKGate, SoftmaxTopKGate
from .hierarchical_gating import HierarchicalGate


def build_gate(config: MoeConfig) -> nn.Module:
    """Return the gate that `config.gating` and `config.num_expert_groups` choose."""
    sizes = (config.hidden_size, config.num_experts, config.num_experts_per_tok)
    if config.num_expert_groups is not None:
        groups = (config.num_expert_groups, config.num_groups_per_tok)
        return HierarchicalGate(*sizes, *groups, config.noise_epsilon, config.gate_std)
    if config.gating == "noisy_top_k":
        return NoisyTopKGate(*sizes, config.noise_epsilon, config.gate_std)
    if config.gating == "strictly_balanced":
        return StrictlyBalancedGate(*sizes)
    return SoftmaxTopKGate(*sizes, config.gate_std)  # for "softmax", K = E


def layer_balancing_loss(
    config: MoeConfig, importance: torch.Tensor, load: torch.Tensor, threshold_loss: torch.Tensor | None
) -> torch.Tensor:
    """Return the weighted balancing losses of one layer, a scalar.

    The losses are w_importance CV(Importance)^2 + w_load CV(Load)^2 (section 4). With strictly balanced gating, the
    loads are equal by construction, so w_threshold L_batchwise replaces the second term (appendix F).

    Args:
        config: has importance_loss_coef, load_loss_coef and threshold_loss_coef.
        importance: (E,), the sum of each expert's gate values.
        load: (E,), the smooth number of tokens of each expert, or the token counts.
        threshold_loss: a scalar, L_batchwise per token; None unless the gating is strictly balanced.
    """
    if threshold_loss is None:
        return balancing_loss(importance, load, config.importance_loss_coef, config.load_loss_coef)
    return config.importance_loss_coef * cv_squared(importance) + config.threshold_loss_coef * threshold_loss


def _used_slots(routed: GateOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the token (R,), expert (R, 1) and weight (R, 1) of each used slot; slots of weight 0 may be included."""
    if routed.most_per_expert is None:
        token_R, slot_R = (routed.top_k_weights > 0).nonzero(as_tuple=True)
        return token_R, routed.top_k_index[token_R, slot_R, None], routed.top_k_weights[token_R, slot_R, None]
    # The slots are all experts in order. The upper bound of an expert's tokens avoids the host read of `nonzero`.
    weights_EM, token_EM = routed.top_k_weights.t().topk(routed.most_per_expert, dim=1)
    expert_EM = torch.arange(len(token_EM), device=token_EM.device)[:, None].expand_as(token_EM)
    return token_EM.flatten(), expert_EM.reshape(-1, 1), weights_EM.reshape(-1, 1)


class MoeBlock(GradientCheckpointingLayer):
    """x + dropout(sigmoid(sum_i G(x)_i E_i(x))), applied to all positions of all sequences at once.

    It has three stages:

    1. The gate chooses experts and weights for every token.
    2. Dispatch, experts, combine (`mix_experts`): tokens are sorted by expert, each expert computes its own tokens,
       and a token's results are summed, weighted by its gate values. `MoeExperts.forward` does all three. Under expert
       parallelism the plan `ep_dispatch_experts` wraps that call: it takes tokens to the processes that hold their
       experts, and brings the results back.
    3. Sigmoid, dropout, residual.

    Args:
        config: see `LstmMoeConfig`. `gating` chooses the gate. `_experts_implementation` chooses how experts are
            computed; None, its default outside of a model, chooses as the models do. The block does not change it.
    """

    def __init__(self, config: MoeConfig):
        super().__init__()
        self.gate = build_gate(config)
        self.is_strictly_balanced = config.gating == "strictly_balanced"
        self.experts = MoeExperts(with_experts_implementation(config))
        self.dropout = nn.Dropout(config.dropout)
        self.recompute_experts = config.recompute_experts

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, S, D).
            mask: (B, S) bool, False for padding, which is neither routed nor counted.
            output_statistics: also report the balancing statistics.

        Returns:
            hidden_states (B, S, D); importance, load and token counts, each (E,) or None; and the threshold loss, a
            scalar, or None unless the gating is strictly balanced. The statistics are outputs instead of attributes,
            so that recomputation in the backward pass does not lose their gradient or count them twice.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        routed = self.gate(hidden_TD, mask_T, output_statistics)
        output_TD = self.mix_experts(hidden_TD, routed)
        output = torch.sigmoid(output_TD).view_as(hidden_states)
        hidden_states = hidden_states + self.dropout(output)
        return hidden_states, routed.importance, routed.load, routed.tokens_per_expert, routed.threshold_loss

    def mix_experts(self, hidden_TD: torch.Tensor, routed: GateOutput) -> torch.Tensor:
        """Return sum_i G(x)_i E_i(x), (T, D); 0 for a token without experts."""
        if not self.is_strictly_balanced:
            return self._run_experts(hidden_TD, routed.top_k_index, routed.top_k_weights)
        # The experts compute every slot, but most slots are unused, because one token with many experts adds slots to
        # all tokens. So each used slot is passed as a separate token (benchmarks/results/balanced-slots.md).
        token_R, index_R1, weights_R1 = _used_slots(routed)
        rows_RD = self._run_experts(hidden_TD.index_select(0, token_R), index_R1, weights_R1)
        zeros_TD = torch.zeros_like(hidden_TD, dtype=weights_R1.dtype)  # summed in at least float32
        return zeros_TD.index_add(0, token_R, rows_RD.to(zeros_TD.dtype)).to(hidden_TD.dtype)

    def _run_experts(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recompute_experts and torch.is_grad_enabled():
            # Experts do not use random numbers, so the random state need not be saved.
            return checkpoint(self.experts, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.experts(*inputs)
