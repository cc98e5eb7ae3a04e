"""The balancing statistics and losses of the paper, one pure function per equation (section 4, appendix A).

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math

import torch


def importance(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return Importance(X)_i = sum_x G(x)_i (equation 6): the sum of each expert's gate values over the tokens.

    Args:
        top_k_index: (T, K) int64, expert ids.
        top_k_weights: (T, K), gate values; 0 for an unused slot.
        num_experts: E.

    Returns:
        (E,), differentiable through `top_k_weights`.
    """
    zeros_E = top_k_weights.new_zeros(num_experts)
    return zeros_E.index_add(0, top_k_index.reshape(-1), top_k_weights.reshape(-1))


def tokens_per_expert(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the number of tokens of each expert, from the slots with G(x)_i > 0. Not differentiable.

    Arguments and result are as for `importance`; the counts have the dtype of `top_k_weights`.
    """
    used_TK = (top_k_weights.detach() > 0).to(top_k_weights.dtype)
    return importance(top_k_index, used_TK, num_experts)


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Return Phi(z), the cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))


def probability_in_top_k(
    clean_logits: torch.Tensor, noisy_logits: torch.Tensor, noise_stddev: torch.Tensor, top_values: torch.Tensor
) -> torch.Tensor:
    """Return P(x, i) of equations 8 and 9: the probability that expert i is in the top k if its noise is redrawn.

    P(x, i) = Phi(((x W_g)_i - kth_excluding(H(x), k, i)) / stddev_i). kth_excluding is the k-th highest value without
    entry i. For an expert in the top k, it is the (k+1)-th highest value of all; for other experts, the k-th highest.

    Args:
        clean_logits: (T, E), x W_g.
        noisy_logits: (T, E), H(x).
        noise_stddev: (T, E), the standard deviation of the noise.
        top_values: (T, K + 1), the K + 1 highest values of `noisy_logits`, in descending order (so K < E).

    Returns:
        (T, E), differentiable.
    """
    threshold_if_in_T1 = top_values[:, -1:]
    threshold_if_out_T1 = top_values[:, -2:-1]
    is_in_TE = noisy_logits > threshold_if_in_T1
    threshold_TE = torch.where(is_in_TE, threshold_if_in_T1, threshold_if_out_T1)
    return normal_cdf((clean_logits - threshold_TE) / noise_stddev)


def cv_squared(values: torch.Tensor) -> torch.Tensor:
    """Return CV(v)^2, the population variance divided by the squared mean; 0 for equal values.

    Args:
        values: (E,), not negative. All zeros (a batch without tokens) give 0.

    Returns:
        a scalar.
    """
    squared_mean = values.mean().square().clamp_min(torch.finfo(values.dtype).tiny)
    return values.var(correction=0) / squared_mean


def balancing_loss(
    importance_E: torch.Tensor, load_E: torch.Tensor, importance_loss_coef: float, load_loss_coef: float
) -> torch.Tensor:
    """Return w_importance CV(Importance)^2 + w_load CV(Load)^2 of one layer (equations 7 and 11), a scalar."""
    return importance_loss_coef * cv_squared(importance_E) + load_loss_coef * cv_squared(load_E)
