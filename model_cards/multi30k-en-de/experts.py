"""The experts: n feed-forward networks of one shape, stacked in 3-D parameters (section 2, appendix C).

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size, R = T * K routed rows.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_moe import MoeConfig
from .experts_choice import OWN_IMPLEMENTATION  # noqa: F401, registers the implementations
from .int8_experts import int8_experts_forward
from .quantization import is_int8


@use_experts_implementation(has_gate=False)
class MoeExperts(nn.Module):
    """E_i(x) = W_down,i act(... act(W_up,i x)), without biases; all experts have the same shape.

    `forward` is the "eager" implementation. By `config._experts_implementation`, Transformers' experts interface
    replaces it with "batched_mm", "grouped_mm" or expert parallelism, which support one hidden layer only.

    Args:
        config: has hidden_size D, num_experts E, moe_intermediate_size H, hidden_act, and num_expert_layers, the
            number of hidden layers of size H.

    Parameters: up_proj (E, H, D), mid_proj (num_expert_layers - 1, E, H, H) if more than one, down_proj (E, D, H).
    """

    def __init__(self, config: MoeConfig):
        super().__init__()
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={config.hidden_act!r} is not known, use one of {', '.join(sorted(ACT2FN))}")
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        shape = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.mid_proj = None
        if config.num_expert_layers > 1:
            self.mid_proj = nn.Parameter(torch.empty(config.num_expert_layers - 1, shape[0], shape[1], shape[1]))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.act_fn = ACT2FN[config.hidden_act]
        self.factored_gradients = False  # see use_factored_gradients
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weights to keep the variance (He, 2015): 2 / inputs before a ReLU, 1 / inputs for the output."""
        init.normal_(self.up_proj, std=(2 / self.hidden_dim) ** 0.5)
        if self.mid_proj is not None:
            init.normal_(self.mid_proj, std=(2 / self.intermediate_dim) ** 0.5)
        init.normal_(self.down_proj, std=self.intermediate_dim**-0.5)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return y = sum_i G(x)_i E_i(x), computing one expert after the other on all of its tokens.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K) int64, expert ids. With expert parallelism, ids of E or more belong to another rank.
            top_k_weights: (T, K), gate values.

        Returns:
            (T, D), in the dtype of `hidden_states`.
        """
        if is_int8(self.up_proj, self.mid_proj, self.down_proj):
            return int8_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        # Rows sorted by expert; ids of E or more come last and are skipped.
        order_R = top_k_index.reshape(-1).argsort(stable=True)
        counts = top_k_index.reshape(-1).bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        order_R = order_R[: sum(counts)]
        token_R = order_R // top_k_index.shape[-1]
        rows_RD = hidden_states.index_select(0, token_R)

        # `unbind` replaces `up_proj[e]` in the loop, whose backward pass would build a zero gradient for all experts
        # at each index. With `unbind`, idle experts get a zero gradient as soon as one expert is computed.
        up, down = self.up_proj.unbind(0), self.down_proj.unbind(0)
        mid = [] if self.mid_proj is None else [layer.unbind(0) for layer in self.mid_proj.unbind(0)]
        outputs = []
        for expert, rows in enumerate(rows_RD.split(counts)):
            if counts[expert] or not (outputs or any(counts)):
                hidden = self.act_fn(nn.functional.linear(rows, up[expert]))
                for layer in mid:
                    hidden = self.act_fn(nn.functional.linear(hidden, layer[expert]))
                outputs.append(nn.functional.linear(hidden, down[expert]))

        weights_R = top_k_weights.reshape(-1).index_select(0, order_R)
        weighted_RD = torch.cat(outputs) * weights_R[:, None]
        combined_TD = torch.zeros_like(hidden_states, dtype=weighted_RD.dtype).index_add(0, token_R, weighted_RD)
        return combined_TD.to(hidden_states.dtype)
