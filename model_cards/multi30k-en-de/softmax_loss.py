"""Cross-entropy over a large vocabulary without all logits in memory: in chunks of tokens, or with sampled classes.

The paper trains its language models by importance sampling over 793,471 words (appendix C).

Shape suffixes: T tokens, C tokens of a chunk, D width, V vocabulary, N sampled classes.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .few_rows_linear import few_rows_linear
from .host_reads import host_reads_are_free
from .quantization import dequantized
from .task_loss import IGNORED


class SoftmaxHead(nn.Linear):
    """The output layer: logits, or the loss computed from its weight.

    `forward` computes the loss, because FSDP, ZeRO-3 and offloading provide the whole weight only inside `forward`.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SoftmaxHead":
        """Return a head with the weight of `linear`, which must not have a bias."""
        head = cls(linear.in_features, linear.out_features, device="meta")
        head.weight = linear.weight
        if hasattr(linear, "_is_hf_initialized"):  # tells the library not to initialise it again
            head._is_hf_initialized = linear._is_hf_initialized
        return head

    def forward(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        num_sampled: int | None = None,
        chunk_size: int | None = None,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (..., D).
            targets: (...) int64, -100 for a position that is not scored. None: return the logits (..., V).
            num_sampled: N, number of classes that estimate the softmax; None: the full softmax.
            chunk_size: number of tokens whose logits are in memory at once; None: all.
            label_smoothing: see `chunked_cross_entropy`; only for the full softmax.

        Returns:
            the logits, or with `targets` the cross-entropy summed over the scored tokens, in nats.

        Raises:
            ValueError: tensor parallelism has split the weight over devices.
        """
        if targets is None:
            return few_rows_linear(hidden_states, self.weight)
        # With tensor parallelism, the weight is a DTensor, or without gradients its local part. FSDP has gathered it
        # here.
        if hasattr(self.weight, "device_mesh") or len(self.weight) != self.out_features:
            raise ValueError(
                "lm_head is tensor parallel: only num_sampled=None and loss_chunk_size=None are allowed, as other "
                "values need the whole weight of lm_head"
            )
        hidden_TD, targets_T = hidden_states.flatten(0, -2), targets.flatten()
        weight = dequantized(self.weight, hidden_states.dtype)
        if num_sampled is None:
            return chunked_cross_entropy(hidden_TD, weight, targets_T, chunk_size, label_smoothing)
        sample = log_uniform_sample(num_sampled, len(weight), hidden_states.device)
        return sampled_softmax_loss(hidden_TD, weight, targets_T, *sample, chunk_size)


def log_uniform_sample(
    num_sampled: int, vocab_size: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw distinct classes with q_i = log((i + 2) / (i + 1)) / log(V + 1), Zipf's law for ids by falling frequency.

    Class i gets the key e_i / q_i with e_i ~ Exp(1), and the N smallest keys are drawn. This is sampling without
    replacement. Let tau be the smallest key that was not drawn. Given tau, class i is in the sample with probability
    1 - exp(-q_i tau), its expected count. A sum over the sample, with each term divided by the expected count, is an
    unbiased estimate of the sum over the vocabulary. This holds exactly for every N; the variance is finite from N = 2
    on (Duffield, Lund and Thorup, 2007). TensorFlow's sampler draws until enough classes are distinct, so its expected
    count, 1 - (1 - q_i)^tries, is approximate.

    The cost grows with V, not with T: one random number and one comparison per class.

    Args:
        num_sampled: N, at least 1 and below `vocab_size`.
        vocab_size: V.
        device: the device to draw on; None: torch's default.

    Returns:
        sample_N int64, ascending, and log_count_N float64, the log of their expected counts (at most 0). The device's
        default generator draws, so `torch.manual_seed` and a restored random state repeat the sample.

    Raises:
        ValueError: `num_sampled` is out of range.
    """
    if not 1 <= num_sampled < vocab_size:
        raise ValueError(f"num_sampled={num_sampled} must be at least 1 and below vocab_size={vocab_size}")
    # float64, because many of 800,000 keys would be equal in float32, and rare classes have probabilities of 1e-7.
    ids_V = torch.arange(1, vocab_size + 1, dtype=torch.float64, device=device)
    q_V = ids_V.reciprocal().log1p() / ids_V.new_tensor(vocab_size + 1).log()
    keys_V = torch.empty_like(q_V).exponential_() / q_V
    keys, index = keys_V.topk(num_sampled + 1, largest=False)
    sample_N = index[:-1].sort().values
    return sample_N, torch.expm1(-q_V[sample_N] * keys[-1]).neg().log()


def sampled_softmax_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    sample_N: torch.Tensor,
    log_count_N: torch.Tensor,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy, with the softmax's denominator estimated from a sample of classes (appendix C).

    With logits o and target y, a token's loss is log Z' - o_y, with the denominator

        Z' = exp(o_y) + sum over the sample's classes j other than y of exp(o_j) / count_j.

    The target is always included, so its count is 1. If the sample contains the target too (an accidental hit), this
    copy is skipped. TensorFlow also divides the target's term by its expected count. That suits a classifier of the
    sampling's outcome, but is not an estimate of Z.

    Over the draws of `log_uniform_sample`, Z' and its gradient are unbiased. The loss and its gradient are biased: log
    is concave, so the mean loss is below that of the full softmax, and the gradient is a quotient of two unbiased
    estimates. Both biases fall as 1 / N. Evaluate models with the full softmax.

    All tokens share the sample. Only the weight's rows of sampled and target classes are read. The weight's gradient
    is dense, with zeros in the other rows. Gradients are exact for the given sample.

    Args:
        hidden_TD: (T, D), of the weight's floating type; autocast applies.
        weight_VD: (V, D).
        targets_T: (T,) int64, -100 for a token that is not scored. Loss and gradients are zero if no token is scored.
        sample_N: (N,) int64, distinct classes, ascending.
        log_count_N: (N,), the log of their expected counts.
        chunk_size: C, number of tokens whose (C, N) logits are in memory at once; None: all.

    Returns:
        a scalar in at least float32. It can be differentiated once.
    """
    hidden_TD, targets_T, unscored_T = _scored(hidden_TD, targets_T)
    sample = sample_N.to(hidden_TD.device), log_count_N.to(hidden_TD.device)
    with_grad = torch.is_grad_enabled()
    return _SampledSoftmax.apply(hidden_TD, weight_VD, targets_T, unscored_T, *sample, chunk_size, with_grad)


def chunked_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed cross-entropy of the full softmax, with the logits of one chunk in memory at a time.

    Loss and gradients equal those of a computation in one piece. The gradients are computed with the loss, chunk by
    chunk, so that logits are not stored or computed twice. The weight's gradient therefore exists from the forward
    pass on.

    The largest tensors are (C, V) and (V, D).

    Args:
        hidden_TD: (T, D), of the weight's floating type; autocast applies.
        weight_VD: (V, D).
        targets_T: (T,) int64, -100 for a token that is not scored. Loss and gradients are zero if no token is scored.
        chunk_size: C, number of tokens whose (C, V) logits are in memory at once; None: all.
        label_smoothing: share of the target's probability that is spread over the whole vocabulary.

    Returns:
        a scalar in at least float32. It can be differentiated once.
    """
    hidden_TD, targets_T, unscored_T = _scored(hidden_TD, targets_T)
    options = (chunk_size, label_smoothing, torch.is_grad_enabled())
    return _ChunkedSoftmax.apply(hidden_TD, weight_VD, targets_T, unscored_T, *options)


class _ChunkedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, unscored_T, chunk_size, label_smoothing, with_grad):
        need_hidden, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        dtype, wide = _dtypes(hidden_TD)
        grad_hidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            rows_VD = weight_VD.to(dtype)
            loss = hidden_TD.new_zeros((), dtype=wide)
            for chunk, buffer_CV in _chunks(hidden_TD, len(weight_VD), chunk_size, wide):
                hidden_CD = hidden_TD[chunk].to(dtype)
                logits_CV = _matmul_into(buffer_CV, hidden_CD, rows_VD.T)
                unscored_C1 = None if unscored_T is None else unscored_T[chunk, None]
                options = (unscored_C1, need_hidden or need_weight, label_smoothing)
                loss += _cross_entropy_(logits_CV, targets_T[chunk, None], *options)
                if need_hidden:
                    grad_hidden_TD[chunk] = logits_CV.to(dtype) @ rows_VD
                if need_weight:
                    _add_matmul_(grad_weight_VD, logits_CV.to(dtype).T, hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), *[None] * 5


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, unscored_T, sample_N, log_count_N, chunk_size, with_grad):
        dtype, wide = _dtypes(hidden_TD)
        num_sampled = len(sample_N)
        # The sample is ascending: the place of each target in it, or the place where the target would be.
        place_T = torch.searchsorted(sample_N, targets_T).clamp(max=num_sampled - 1)
        is_hit_T = sample_N[place_T] == targets_T
        grad_hidden_TD = torch.empty_like(hidden_TD) if with_grad else None
        grad_targets_TD = torch.empty_like(hidden_TD) if with_grad else None
        grad_rows_ND = weight_VD.new_zeros(num_sampled, hidden_TD.shape[1], dtype=wide) if with_grad else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            rows_ND, log_count_N = weight_VD[sample_N].to(dtype), log_count_N.to(wide)
            loss = hidden_TD.new_zeros((), dtype=wide)
            # The last column belongs to the target.
            for chunk, buffer in _chunks(hidden_TD, num_sampled + 1, chunk_size, wide):
                hidden_CD, target_rows_CD = hidden_TD[chunk].to(dtype), weight_VD[targets_T[chunk]].to(dtype)
                logits_CN = _matmul_into(buffer[:, :-1], hidden_CD, rows_ND.T).sub_(log_count_N)
                place_C1 = place_T[chunk, None]
                without_hit_C1 = logits_CN.gather(1, place_C1).masked_fill(is_hit_T[chunk, None], -torch.inf)
                logits_CN.scatter_(1, place_C1, without_hit_C1)
                buffer[:, -1] = (hidden_CD.to(wide) * target_rows_CD.to(wide)).sum(-1)
                unscored_C1 = None if unscored_T is None else unscored_T[chunk, None]
                last_C1 = torch.full_like(targets_T[chunk, None], num_sampled)
                loss += _cross_entropy_(buffer, last_C1, unscored_C1, with_grad)
                if with_grad:
                    grad_CN, grad_target_C1 = logits_CN.to(dtype), buffer[:, -1:].to(dtype)
                    grad_hidden_TD[chunk] = grad_CN @ rows_ND + grad_target_C1 * target_rows_CD
                    grad_targets_TD[chunk] = grad_target_C1 * hidden_CD
                    _add_matmul_(grad_rows_ND, grad_CN.T, hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, grad_rows_ND, grad_targets_TD, sample_N, targets_T)
        ctx.weight_shape, ctx.weight_dtype = weight_VD.shape, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden_TD, grad_rows_ND, grad_targets_TD, sample_N, targets_T = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad_hidden_TD * grad.to(grad_hidden_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows_ND.new_zeros(ctx.weight_shape, dtype=ctx.weight_dtype)
            grad_weight[sample_N] = (grad_rows_ND * grad).to(ctx.weight_dtype)
            grad_weight.index_add_(0, targets_T, (grad_targets_TD * grad).to(ctx.weight_dtype))
        return grad_hidden, grad_weight, *[None] * 6


def _scored(
    hidden_TD: torch.Tensor, targets_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the scored tokens, and their targets on the hidden states' device.

    On a device, selecting the tokens would need a host read. There, all tokens stay, a mask (T,) bool marks the tokens
    that are not scored, and their targets are 0.
    """
    targets_T = targets_T.to(hidden_TD.device)
    scored_T = targets_T != IGNORED
    if host_reads_are_free(hidden_TD.device):
        return hidden_TD[scored_T], targets_T[scored_T], None
    return hidden_TD, targets_T.masked_fill(~scored_T, 0), ~scored_T


def _dtypes(hidden: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the products (autocast's, if it is on), and of logits, loss and sums (at least float32)."""
    dtype, device = hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        # The gradient is computed before the Trainer's loss scale is known. Probabilities of 1e-6 are common in a
        # large vocabulary, and float16 cannot represent them precisely.
        dtype = torch.float32
    return dtype, torch.promote_types(dtype, torch.float32)


def _chunks(hidden_TD: torch.Tensor, columns: int, chunk_size: int | None, dtype: torch.dtype):
    """Yield slices of tokens with a (C, columns) buffer. All slices share its memory: allocation is slow on a CPU."""
    num_tokens = len(hidden_TD)
    size = max(1, min(num_tokens, chunk_size or num_tokens))
    buffer = hidden_TD.new_empty(size, columns, dtype=dtype)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size), buffer[: min(size, num_tokens - start)]


def _matmul_into(buffer: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype == buffer.dtype:
        return torch.mm(left, right, out=buffer)
    return buffer.copy_(left @ right)


def _add_matmul_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _cross_entropy_(
    logits: torch.Tensor,
    column: torch.Tensor,
    unscored: torch.Tensor | None,
    with_grad: bool,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed cross-entropy of the columns (C, 1), and overwrite the logits, `with_grad` by their gradient.

    Rows where `unscored` (C, 1) is True do not count, and their gradient is 0.
    """
    wanted = (1 - label_smoothing) * logits.gather(1, column)
    if label_smoothing:
        wanted += label_smoothing * logits.mean(1, keepdim=True)
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    if with_grad:
        logits.div_(total)
        if label_smoothing:
            logits.sub_(label_smoothing / logits.shape[1])
        logits.scatter_add_(1, column, torch.full_like(wanted, label_smoothing - 1))
        if unscored is not None:
            logits.masked_fill_(unscored, 0)
    nats = total.log() + top - wanted
    return nats.sum() if unscored is None else nats.masked_fill(unscored, 0).sum()
