"""Gates, which choose experts and their weights for each token (section 2.1).

Every gate maps hidden states (T, D) and a mask (T,) to a `GateOutput`. Gates compute in at least float32, also under
autocast. The two-level gate is in hierarchical_gating.py, and the strictly balanced gate is in balanced_gating.py.

Shape suffixes: T tokens, D width, E experts, K experts per token.
"""

import warnings
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .autocast import autocast_dtype
from .balancing import importance, probability_in_top_k, tokens_per_expert
from .float32_products import full_float32
from .gate_pieces import is_for_pieces, noisy_top_k_in_pieces


class GateOutput(NamedTuple):
    """The decision and the statistics of a gate. The four statistics are None if they were not requested.

    top_k_index: (T, K) int64, global expert ids, the highest weight first.
    top_k_weights: (T, K), at least float32; 0 for an unused slot. All slots of a padding token are unused.
    router_logits: (T, E), x W_g without noise; from a hierarchical gate, the logits over its groups (T, G).
    importance: (E,), differentiable.
    load: (E,), differentiable with noise; without noise, the token counts.
    tokens_per_expert: (E,), the number of tokens of each expert.
    threshold_loss: a scalar, L_batchwise per token, only from `StrictlyBalancedGate`.
    most_per_expert: an upper bound of an expert's tokens, if `StrictlyBalancedGate` knows it without a host read.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    router_logits: torch.Tensor
    importance: torch.Tensor | None = None
    load: torch.Tensor | None = None
    tokens_per_expert: torch.Tensor | None = None
    threshold_loss: torch.Tensor | None = None
    most_per_expert: int | None = None


def linear_in_float32(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W^T in at least float32, also under autocast and with TF32."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    device = hidden_states.device
    no_autocast = nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
    with no_autocast, full_float32(device):
        return nn.functional.linear(hidden_states.to(dtype), weight.to(dtype))


@torch.no_grad()
def reset_gate(weight: torch.Tensor, gate_std: float) -> None:
    """Initialise W_g (..., D): zeros, or at random with logits of standard deviation `gate_std` for unit variance."""
    if gate_std:
        init.normal_(weight, std=gate_std * weight.shape[-1] ** -0.5)
    else:
        init.zeros_(weight)


def noisy_top_k(
    clean_logits: torch.Tensor, noise_stddev: torch.Tensor | None, k: int, need_probability: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw noise, and return softmax(keep_top_k(H(x), k)) with H(x) = x W_g + N(0, 1) * stddev(x) (equations 3 to 5).

    Args:
        clean_logits: (T, E), x W_g.
        noise_stddev: (T, E); None: no noise.
        k: K, at most E.
        need_probability: also compute P(x, i) of equation 9.

    Returns:
        top_k_index (T, K) and top_k_weights (T, K), the highest weight first, and P (T, E). P is None if it was not
        requested or is not defined: without noise, or for K = E.
    """
    noisy_TE = clean_logits
    if noise_stddev is not None:
        noisy_TE = clean_logits + torch.randn_like(clean_logits) * noise_stddev
    num_experts = clean_logits.shape[-1]
    top_values, top_index = noisy_TE.topk(min(k + 1, num_experts), dim=-1)
    probability_TE = None
    if need_probability and noise_stddev is not None and k < num_experts:
        probability_TE = probability_in_top_k(clean_logits, noisy_TE, noise_stddev, top_values)
    return top_index[:, :k], top_values[:, :k].softmax(dim=-1), probability_TE


class NoisyTopKGate(nn.Module):
    """Noisy top-k gating (equations 3 to 5): G(x) = softmax(keep_top_k(x W_g + N(0, 1) * stddev(x), k)).

    stddev(x) = softplus(x W_noise) + noise_epsilon. Both matrices start at zero by default, so that the experts' load
    starts equal. Noise is used only in training; evaluation is deterministic.

    Args:
        hidden_size: D.
        num_experts: E.
        num_experts_per_tok: K, at most E.
        noise_epsilon: the minimal standard deviation of the noise (not in the paper; the authors' code has 1e-2).
        gate_std: initial standard deviation of the logits x W_g, for an input of unit variance.
        names: the arguments' names for E and K in errors and warnings.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        noise_epsilon: float = 1e-2,
        gate_std: float = 0.0,
        names: tuple[str, str] = ("num_experts", "num_experts_per_tok"),
    ):
        super().__init__()
        check_top_k(num_experts, num_experts_per_tok, names)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.noise_epsilon = noise_epsilon
        self.gate_std = gate_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise W_g by `reset_gate`, and W_noise to zero."""
        reset_gate(self.weight, self.gate_std)
        init.zeros_(self.noise_weight)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> GateOutput:
        """Route tokens.

        Args:
            hidden_states: (T, D).
            mask: (T,) bool, False for padding. Padding is not routed (all its weights are 0) and not counted.
            output_statistics: also compute importance, load and the token counts.
        """
        k, num_experts = self.num_experts_per_tok, self.num_experts
        load_E = stddev_TE = None
        if self.training and output_statistics and k < num_experts and is_for_pieces(hidden_states, num_experts):
            clean_TE, top_k_index, top_k_weights, load_E = noisy_top_k_in_pieces(
                hidden_states, self.weight, self.noise_weight, mask, k, self.noise_epsilon
            )
        else:
            clean_TE = linear_in_float32(hidden_states, self.weight)
            if self.training:
                raw_stddev_TE = linear_in_float32(hidden_states, self.noise_weight)
                stddev_TE = nn.functional.softplus(raw_stddev_TE) + self.noise_epsilon
            top_k_index, top_k_weights, probability_TE = noisy_top_k(clean_TE, stddev_TE, k, output_statistics)
            if probability_TE is not None:
                load_E = masked(probability_TE, mask).sum(dim=0)
        top_k_weights = masked(top_k_weights, mask)
        if not output_statistics:
            return GateOutput(top_k_index, top_k_weights, clean_TE)

        counts_E = tokens_per_expert(top_k_index, top_k_weights, num_experts)
        load_E = counts_E if load_E is None else load_E
        importance_E = importance(top_k_index, top_k_weights, num_experts)
        return GateOutput(top_k_index, top_k_weights, clean_TE, importance_E, load_E, counts_E)


class SoftmaxTopKGate(nn.Module):
    """Softmax gating (equation 2) restricted to the top k and renormalised: the baseline without noise.

    With K = E, it is the dense gate of equation 2, where every token uses every expert. The load is the token counts,
    which are not differentiable, so only the importance loss balances this gate. Arguments and `forward` are as for
    `NoisyTopKGate`.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int, gate_std: float = 0.0):
        super().__init__()
        check_top_k(num_experts, num_experts_per_tok)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.gate_std = gate_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise W_g by `reset_gate`."""
        reset_gate(self.weight, self.gate_std)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics: bool = True
    ) -> GateOutput:
        logits_TE = linear_in_float32(hidden_states, self.weight)
        top_values, top_k_index = logits_TE.topk(self.num_experts_per_tok, dim=-1)
        # The softmax over the kept logits equals the full softmax, renormalised over the kept logits.
        top_k_weights = masked(top_values.softmax(dim=-1), mask)
        if not output_statistics:
            return GateOutput(top_k_index, top_k_weights, logits_TE)
        counts_E = tokens_per_expert(top_k_index, top_k_weights, self.num_experts)
        importance_E = importance(top_k_index, top_k_weights, self.num_experts)
        return GateOutput(top_k_index, top_k_weights, logits_TE, importance_E, counts_E, counts_E)


def masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return `values` (T, ...) with the rows of padding tokens set to 0."""
    return values if mask is None else values.masked_fill(~mask.bool()[:, None], 0)


def check_top_k(
    num_experts: int, num_experts_per_tok: int, names: tuple[str, str] = ("num_experts", "num_experts_per_tok")
) -> None:
    """Refuse a K out of range; warn about K = 1 among several experts, which the task's gradient cannot train."""
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(f"{names[1]}={num_experts_per_tok} must lie between 1 and {names[0]}={num_experts}")
    if num_experts_per_tok == 1 and num_experts > 1:
        warnings.warn(
            f"{names[1]}=1: the softmax over one expert is always 1, so the gate gets no gradient from the task, only "
            "from the balancing losses; use at least 2",
            stacklevel=3,
        )
