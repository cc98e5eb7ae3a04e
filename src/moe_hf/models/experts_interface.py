"""Which implementation computes the experts, registered in Transformers' experts interface."""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .int8_experts import int8_experts_forward
from .quantization import is_int8
from .segment_experts import segment_experts_forward

OWN_IMPLEMENTATION = "moe_hf"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`MoeExperts.forward` by the fastest implementation that the device and the sizes allow.

    On a CPU the segments (benchmarks/results/experts.md); elsewhere the library's grouped matrix products, not
    measured yet, whose kernel wants multiples of 8 and at most 32 bits.
    """
    if is_int8(module.up_proj, module.mid_proj, module.down_proj):
        return int8_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    is_grouped = module.up_proj.device.type != "cpu" and module.up_proj.element_size() <= 4
    is_grouped = is_grouped and module.hidden_dim % 8 == 0 and module.intermediate_dim % 8 == 0
    forward = grouped_mm_experts_forward if is_grouped else segment_experts_forward
    return forward(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(OWN_IMPLEMENTATION, experts_forward)
