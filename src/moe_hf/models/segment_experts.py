"""Our implementation of the experts, as Transformers' experts interface knows it, and its kernel for a CPU.

The kernel sorts once, works on contiguous segments, and has a backward pass written by hand. What makes it fast:
- Idle experts cost nothing forward, and slots of weight 0 (padding) are not computed at all.
- A gate's gradient is taken in the hidden space, w' = <dE/dh, h>, so that no expert's output is kept or scaled.
- Gradients are written into memory that is not cleared first, except the idle experts' part.
- The k results of a token are summed by `embedding_bag`, once forward and once backward.

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size, R = T * K routed rows.
"""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward, grouped_mm_experts_forward

from .autocast import autocast_dtype
from .factored_gradients import RowGradients, check_parameters, row_gradients, will_be_accumulated
from .few_tokens import few_tokens, is_few_on_cpu
from .native_experts import Visited, few_rows

OWN_IMPLEMENTATION = "moe_hf"
# Up to so many slots a compiled step takes each slot's expert by itself, which the compiler joins with its neighbours.
COMPILED_SLOTS = 32
# A name of its own for every copy of this file: a checkpoint from the Hub brings one.
_NAMESPACE = __name__.replace(".", "_")


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`MoeExperts.forward` by the fastest implementation that the device and the sizes allow.

    On a CPU the segments (benchmarks/results/experts.md); elsewhere the library's grouped matrix products, not
    measured yet, whose kernel wants multiples of 8 and at most 32 bits.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and top_k_index.numel() <= COMPILED_SLOTS:
        return batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    is_grouped = module.up_proj.device.type not in ("cpu", "meta") and module.up_proj.element_size() <= 4
    is_grouped = is_grouped and module.hidden_dim % 8 == 0 and module.intermediate_dim % 8 == 0
    is_grouped = is_grouped and not module.factored_gradients
    forward = grouped_mm_experts_forward if is_grouped else segment_experts_forward
    return forward(module, hidden_states, top_k_index, top_k_weights)


def segment_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`MoeExperts.forward` for one hidden layer of ReLU units: same arguments, same result, on any device.

    A slot whose weight is exactly 0 is skipped, and so has no gradient for that weight. There is no second derivative.
    """
    dtype = hidden_states.dtype
    compute_dtype = autocast_dtype(hidden_states.device) or dtype
    if module.factored_gradients and torch.is_grad_enabled() and module.up_proj.requires_grad:
        check_parameters(module)
        x = hidden_states.to(compute_dtype)
        return _run_factored(x, top_k_index, top_k_weights, module.up_proj, module.down_proj).to(dtype)
    up, down = module.up_proj.to(compute_dtype), module.down_proj.to(compute_dtype)
    if is_few_on_cpu(hidden_states, top_k_index):
        return few_tokens(hidden_states.to(compute_dtype), top_k_index, top_k_weights, up, down).to(dtype)
    tensors = (hidden_states, top_k_weights, up, down)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    output, *_ = _experts(hidden_states.to(compute_dtype), top_k_index, top_k_weights, up, down, keep)
    return output.to(dtype)


@torch.library.custom_op(f"{_NAMESPACE}::segment_experts", mutates_args=())
def _experts(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, D), index and weights (T, K), up (E, H, D), down (E, D, H).

    Returns the output (T, D), and three tensors for the backward pass: the rows' hidden units (R, H), empty unless
    `keep`, the slot of each row (R,), and the number of rows of each expert (E,).
    """
    num_experts, num_hidden, _ = up.shape
    order_R, counts_E = _sort(index, weights, num_experts)
    counts = counts_E.tolist()
    num_rows = sum(counts)
    rows_RD = x.index_select(0, order_R[:num_rows] // index.shape[1])
    limit = _rows_for_kernels(x, up, down)
    hidden_RH = x.new_empty(len(order_R) if keep or limit else max(counts, default=0), num_hidden)
    output_RD = x.new_empty(len(order_R), x.shape[1])
    output_RD[num_rows:] = 0
    if limit:
        Visited(counts_E, limit).forward(up, down, rows_RD, hidden_RH, output_RD)
    start = 0
    for expert, count in enumerate(counts):
        if count <= limit:
            start += count
        elif count:
            here, start = slice(start, start + count), start + count
            hidden = hidden_RH[here] if keep else hidden_RH[:count]
            up_HD, down_DH = up[expert].to(x.dtype), down[expert].to(x.dtype)
            if _is_faster_transposed(count, up_HD):
                transposed = torch.mm(up_HD, rows_RD[here].t()).relu_()
                output_RD[here] = torch.mm(down_DH, transposed).t()
                if keep:
                    hidden.copy_(transposed.t())
            else:
                torch.mm(rows_RD[here], up_HD.t(), out=hidden)
                torch.mm(hidden.relu_(), down_DH.t(), out=output_RD[here])
    output = _sum_slots(output_RD, order_R, weights)
    return output, hidden_RH if keep else x.new_empty(0, num_hidden), order_R, counts_E


def _rows_for_kernels(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> int:
    """Up to how many rows an expert is computed by the compiled kernels."""
    fits = up.dtype == down.dtype == x.dtype and up.is_contiguous() and down.is_contiguous()
    return few_rows(x.dtype, x.device, up.shape[2], up.shape[1]) if fits else 0


def _is_faster_transposed(count: int, weight: torch.Tensor) -> bool:
    """Whether W x' takes less time than x W', transposing included, for a weight that no cache holds.

    Measured with oneMKL, float32 and one thread: for 16 and 32 rows half the time, for 4 or 128 none saved.
    """
    return 8 <= count <= 64 and weight.numel() >= 2**18


@torch.library.custom_op(f"{_NAMESPACE}::segment_experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hidden_RH: torch.Tensor,
    order_R: torch.Tensor,
    counts_E: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients with respect to x, weights, up and down."""
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    inputs = (grad, x, weights, up, down, hidden_RH, order_R, counts_E)
    grad_x, grad_weights, *_ = _backward_loop(*inputs, grad_up, grad_down)
    return grad_x, grad_weights, grad_up, grad_down


def _backward_loop(
    grad, x, weights, up, down, hidden_RH, order_R, counts_E, grad_up=None, grad_down=None
) -> tuple[torch.Tensor, ...]:
    """Writes `grad_up` and `grad_down`, unless they are None.

    Returns the gradients with respect to x and weights and, for the gradients of the experts as factors, the weighted
    gradients at the outputs (R, D), the gradients at the hidden units (R, H) and the inputs (R, D).
    """
    counts = counts_E.tolist()
    num_rows, k = sum(counts), weights.shape[1]
    token_R = order_R[:num_rows] // k
    rows_RD = x.index_select(0, token_R)
    grad_RD = grad.index_select(0, token_R)
    weights_R = weights.reshape(-1).index_select(0, order_R[:num_rows]).to(x.dtype)
    grad_weights = torch.zeros_like(weights)
    grad_weights_R = weights_R.new_empty(num_rows)
    grad_rows_RD = x.new_empty(len(order_R), x.shape[1])
    grad_rows_RD[num_rows:] = 0
    is_factored = grad_up is None
    limit = _rows_for_kernels(x, up, down)
    grad_RH = x.new_empty(num_rows if is_factored or limit else max(counts, default=0), up.shape[1])
    if limit:
        outputs = (grad_RD, grad_RH, grad_weights_R, grad_rows_RD)
        Visited(counts_E, limit).backward(up, down, hidden_RH, weights_R, *outputs)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            if not is_factored:
                grad_up[expert] = 0
                grad_down[expert] = 0
            continue
        here, start = slice(start, start + count), start + count
        hidden, grad_hidden = hidden_RH[here], grad_RH[here] if is_factored or limit else grad_RH[:count]
        rows, grads, scale = rows_RD[here], grad_RD[here], weights_R[here, None]
        if count > limit:
            torch.mm(grads, down[expert].to(x.dtype), out=grad_hidden)
            torch.sum(grad_hidden * hidden, dim=1, out=grad_weights_R[here])
            grads.mul_(scale)
            grad_hidden.mul_(scale)
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
            torch.mm(grad_hidden, up[expert].to(x.dtype), out=grad_rows_RD[here])
        if not is_factored:
            torch.mm(grads.t(), hidden, out=grad_down[expert])
            torch.mm(grad_hidden.t(), rows, out=grad_up[expert])
    grad_weights.view(-1)[order_R[:num_rows]] = grad_weights_R.to(weights.dtype)
    return _sum_slots(grad_rows_RD, order_R, weights, weigh=False), grad_weights, grad_RD, grad_RH, rows_RD


class _FactoredExperts(torch.autograd.Function):
    """The same forward pass; the backward pass leaves the experts' gradients as rows on their parameters."""

    @staticmethod
    def forward(ctx, x, index, weights, up, down):
        output, *kept = _experts(x, index, weights, up, down, True)
        ctx.save_for_backward(x, weights, *kept)
        ctx.parameters = up, down
        ctx.versions = up._version, down._version
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weights, hidden_RH, order_R, counts_E = ctx.saved_tensors
        up, down = ctx.parameters
        if ctx.versions != (up._version, down._version):
            raise RuntimeError("experts were changed between the forward and the backward pass")
        inputs = (grad.contiguous(), x, weights, up.detach(), down.detach(), hidden_RH, order_R, counts_E)
        grad_x, grad_weights, grad_RD, grad_RH, rows_RD = _backward_loop(*inputs)
        *_, up_edge, down_edge = ctx.next_functions
        if will_be_accumulated(up_edge):
            up.row_gradients = [*row_gradients(up), RowGradients(grad_RH, rows_RD, counts_E)]
        if will_be_accumulated(down_edge):
            hidden_RH = hidden_RH[: len(rows_RD)]
            down.row_gradients = [*row_gradients(down), RowGradients(grad_RD, hidden_RH, counts_E)]
        return grad_x, None, grad_weights, None, None


# A compiled graph cannot leave rows on a parameter.
_run_factored = torch.compiler.disable(_FactoredExperts.apply)


def _sort(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots (R,) by expert, those that are not computed last; and the number of computed ones of each expert (E,)."""
    small = torch.int16 if num_experts < 2**15 - 1 else torch.int32
    ids_R = index.clamp(max=num_experts).masked_fill(weights == 0, num_experts).view(-1)
    counts_E = ids_R.bincount(minlength=num_experts + 1)[:num_experts]
    return ids_R.to(small).argsort(stable=True), counts_E


def _sum_slots(
    rows_RD: torch.Tensor, order_R: torch.Tensor, weights: torch.Tensor, weigh: bool = True
) -> torch.Tensor:
    """Rows in the order of the experts -> (T, D), the sum of each token's K, weighted by `weights` (T, K) or not."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    scale = weights.to(rows_RD.dtype) if weigh else None
    return nn.functional.embedding_bag(place_R.view_as(weights), rows_RD, mode="sum", per_sample_weights=scale)


@_experts.register_fake
def _(x, index, weights, up, down, keep):
    rows = index.numel()
    hidden = x.new_empty(rows if keep else 0, up.shape[1])
    return torch.empty_like(x), hidden, index.new_empty(rows), index.new_empty(up.shape[0])


@_experts_backward.register_fake
def _(grad, x, weights, up, down, hidden_RH, order_R, counts_E):
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(up), torch.empty_like(down)


def _keep_for_backward(ctx, inputs, output):
    x, _, weights, up, down, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weights, up, down, *output[1:])


def _backward(ctx, grad, *_):
    grad_x, grad_weights, grad_up, grad_down = _experts_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_up, grad_down, None


_experts.register_autograd(_backward, setup_context=_keep_for_backward)
ALL_EXPERTS_FUNCTIONS.register(OWN_IMPLEMENTATION, experts_forward)
