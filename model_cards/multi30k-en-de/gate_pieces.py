"""The noisy top-k gate for many experts on a CPU: forward and backward compute one piece of the tokens at a time.

In plain torch, noise, standard deviations and probabilities take a dozen tensors of (T, E). With thousands of experts,
they do not fit into the cache. Here, only the two logits have this size; even their gradients are smaller.

Shape suffixes: T tokens, D width, E experts, K experts per token, P tokens of a piece.
"""

import math
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

# Fewer logits than this are computed in one piece, with plain torch.
MIN_LOGITS = 2**20
# Logits of a piece, and its minimal number of tokens: smaller pieces would read both matrices too often. Torch draws
# normal numbers in blocks of 16, so pieces of a multiple of 16 tokens draw the same numbers as the whole batch.
PIECE_LOGITS = 2**18
MIN_TOKENS = 64


def is_for_pieces(hidden_states: torch.Tensor, num_experts: int) -> bool:
    """Return whether to use `noisy_top_k_in_pieces` for a batch (T, D); not while compiling, which cannot trace it."""
    is_large = len(hidden_states) * num_experts > MIN_LOGITS and num_experts >= 16
    return is_large and hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()


def noisy_top_k_in_pieces(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    noise_weight: torch.Tensor,
    mask: torch.Tensor | None,
    k: int,
    noise_epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute equations 3 to 5 and 8 to 10, with the same noise as `noisy_top_k`.

    Args:
        hidden_states: (T, D).
        weight: (E, D), W_g.
        noise_weight: (E, D), W_noise.
        mask: (T,) bool, False for tokens that are not counted.
        k: K, below E.
        noise_epsilon: the minimal standard deviation.

    Returns:
        x W_g (T, E), the indices (T, K) and weights (T, K) of the top k, and the load (E,).
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    inputs = (tensor.to(dtype) for tensor in (hidden_states, weight, noise_weight))
    with torch.autocast("cpu", enabled=False):
        clean_TE, index, values, load_E = _NoisyTopK.apply(*inputs, mask, k, noise_epsilon)
    return clean_TE, index, values.softmax(dim=-1), load_E


class _NoisyTopK(torch.autograd.Function):
    """Returns values, not weights, so that autograd computes the softmax. P = Phi((x W_g - threshold) / stddev)."""

    @staticmethod
    def forward(ctx, x, weight, noise_weight, mask, k, noise_epsilon):
        shape = (len(x), len(weight))
        clean_TE, raw_TE = x.new_empty(shape), x.new_empty(shape)
        top_values, top_noise = x.new_empty(len(x), k + 1), x.new_empty(len(x), k + 1)
        top_index = torch.empty(len(x), k + 1, dtype=torch.int64)
        load_E = x.new_zeros(len(weight))
        scratch = _scratch(x, weight, 3)
        for here in _pieces(*shape):
            clean, raw = clean_TE[here], raw_TE[here]
            noise, noisy, stddev = (part[: len(clean)] for part in scratch)
            torch.mm(x[here], weight.t(), out=clean)
            torch.mm(x[here], noise_weight.t(), out=raw)
            _standard_deviation(raw, noise_epsilon, out=stddev)
            noise.normal_()
            torch.mul(noise, stddev, out=noisy).add_(clean)
            top_values[here], top_index[here] = noisy.topk(k + 1, dim=-1)
            top_noise[here] = noise.gather(1, top_index[here])
            z = _z(clean, stddev, top_values[here], top_index[here], out=noisy)
            probability = z.mul_(math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
            load_E += _masked(probability, mask, here).sum(dim=0)
        ctx.save_for_backward(x, weight, noise_weight, mask, clean_TE, raw_TE, top_values, top_index, top_noise)
        ctx.noise_epsilon = noise_epsilon
        index = top_index[:, :k].contiguous()
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return clean_TE, index, top_values[:, :k].contiguous(), load_E

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_clean_TE, _, grad_values, grad_load_E):
        x, weight, noise_weight, mask, clean_TE, raw_TE, top_values, top_index, top_noise = ctx.saved_tensors
        grad_x, grad_weight, grad_noise_weight = (torch.zeros_like(tensor) for tensor in (x, weight, noise_weight))
        scratch = _scratch(x, weight, 3)
        for here in _pieces(*clean_TE.shape):
            raw, index = raw_TE[here], top_index[here]
            stddev, grad_clean, grad_raw = (part[: len(raw)] for part in scratch)
            grad_top = torch.zeros_like(top_values[here])
            if grad_values is not None:
                grad_top[:, :-1] = grad_values[here]
            if grad_load_E is None:
                grad_clean.zero_(), grad_raw.zero_()
            else:
                _standard_deviation(raw, ctx.noise_epsilon, out=stddev)
                z = _z(clean_TE[here], stddev, top_values[here], index, out=grad_raw)
                # With z = (x W_g - threshold) / stddev: dP / d(x W_g) = phi(z) / stddev, dP / dstddev = -z phi(z) /
                # stddev, and dP / dthreshold = -dP / d(x W_g). The threshold is noisy logit K + 1 for experts in the
                # top k, and noisy logit K for other experts.
                torch.mul(z, z, out=grad_clean).mul_(-0.5).exp_().div_(stddev).mul_(
                    grad_load_E / math.sqrt(2 * math.pi)
                )
                _masked(grad_clean, mask, here)
                grad_in = (grad_clean.gather(1, index) * _is_in(top_values[here])).sum(dim=-1)
                grad_top[:, -1] -= grad_in
                grad_top[:, -2] -= grad_clean.sum(dim=-1) - grad_in
                z.mul_(grad_clean).neg_()
                _masked(z, mask, here)
            grad_clean.scatter_add_(1, index, grad_top)
            grad_raw.scatter_add_(1, index, grad_top * top_noise[here])
            grad_raw.mul_(torch.sigmoid(raw, out=stddev))
            if grad_clean_TE is not None:
                grad_clean += grad_clean_TE[here]
            torch.mm(grad_clean, weight, out=grad_x[here]).addmm_(grad_raw, noise_weight)
            grad_weight.addmm_(grad_clean.t(), x[here])
            grad_noise_weight.addmm_(grad_raw.t(), x[here])
        return grad_x, grad_weight, grad_noise_weight, None, None, None


def _pieces(num_tokens: int, num_experts: int) -> Iterator[slice]:
    size = max(MIN_TOKENS, PIECE_LOGITS // num_experts // 16 * 16)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _scratch(x: torch.Tensor, weight: torch.Tensor, number: int) -> list[torch.Tensor]:
    largest = next(_pieces(len(x), len(weight)))
    return [x.new_empty(largest.stop, len(weight)) for _ in range(number)]


def _standard_deviation(raw: torch.Tensor, noise_epsilon: float, out: torch.Tensor) -> None:
    torch.ops.aten.softplus.out(raw, out=out)
    out.add_(noise_epsilon)


def _is_in(top_values: torch.Tensor) -> torch.Tensor:
    """Return (P, K + 1) bool, which of the K + 1 highest exceed the last one; ties as in `probability_in_top_k`."""
    return top_values > top_values[:, -1:]


def _z(clean, stddev, top_values, top_index, out: torch.Tensor) -> torch.Tensor:
    """Return (clean - threshold) / stddev, (P, E), with the thresholds of `probability_in_top_k`."""
    torch.sub(clean, top_values[:, -2:-1], out=out).div_(stddev)
    threshold = torch.where(_is_in(top_values), top_values[:, -1:], top_values[:, -2:-1])
    return out.scatter_(1, top_index, (clean.gather(1, top_index) - threshold) / stddev.gather(1, top_index))


def _masked(values: torch.Tensor, mask: torch.Tensor | None, here: slice) -> torch.Tensor:
    """Set the rows of uncounted tokens in `values` (P, E) to 0, in place, and return `values`."""
    return values if mask is None else values.masked_fill_(~mask[here].bool()[:, None], 0)
