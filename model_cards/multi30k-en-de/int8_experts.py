"""Computes experts with quantized weights, with one sort and at most one matrix in floating point at a time.

Shape suffixes: T tokens, D width, E experts, K experts per token, R = T * K routed rows.
"""

import torch
from torch import nn

from .quantization import expert_linear
from .segment_experts import _sort, _sum_slots


def int8_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute `MoeExperts.forward` with quantized weights, for any activation and number of hidden layers.

    A slot whose weight is exactly 0 is skipped. Quantized weights do not get gradients.
    """
    order_R, counts_E = _sort(top_k_index, top_k_weights, module.num_experts)
    counts = counts_E.tolist()
    rows_RD = hidden_states.index_select(0, order_R[: sum(counts)] // top_k_index.shape[1])
    num_mid = 0 if module.mid_proj is None else len(module.mid_proj)
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            rows, start = rows_RD[start : start + count], start + count
            hidden = module.act_fn(expert_linear(rows, module.up_proj, expert))
            for layer in range(num_mid):
                hidden = module.act_fn(expert_linear(hidden, module.mid_proj, (layer, expert)))
            outputs.append(expert_linear(hidden, module.down_proj, expert))
    dtype = outputs[0].dtype if outputs else hidden_states.dtype  # autocast's dtype, if it is on
    outputs.append(rows_RD.new_zeros(len(order_R) - start, hidden_states.shape[1], dtype=dtype))
    return _sum_slots(torch.cat(outputs), order_R, top_k_weights).to(hidden_states.dtype)
