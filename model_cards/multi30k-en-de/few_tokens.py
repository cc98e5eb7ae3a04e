"""The experts of one or two tokens on a CPU, as in a decoding step: one product per slot, without sorting.

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size.
"""

import torch

FEW_TOKENS = 2


def is_few_on_cpu(x: torch.Tensor, index: torch.Tensor) -> bool:
    """Return whether `few_tokens` is the fastest. With 4 tokens, it would read shared experts repeatedly.

    The result of `few_tokens` does not have a gradient, and a compiler or a fake tensor cannot follow the ids it
    reads.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(x) > FEW_TOKENS:
        return False
    return type(x) is torch.Tensor and x.device.type == "cpu" and type(index) is torch.Tensor


def few_tokens(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Return sum_i G(x)_i W_down,i relu(W_up,i x), (T, D).

    Args:
        x: (T, D).
        index: (T, K) int64, expert ids; an id of E or more belongs to another rank.
        weights: (T, K), 0 for an unused slot.
        up: (E, H, D).
        down: (E, D, H).
    """
    output_TD = torch.zeros_like(x)
    for token, experts, values in zip(range(len(x)), index.tolist(), weights.tolist()):
        for expert, value in zip(experts, values):
            if value != 0 and expert < len(up):
                hidden_H = torch.mv(up[expert], x[token]).relu_()
                output_TD[token].addmv_(down[expert], hidden_H, alpha=value)
    return output_TD
