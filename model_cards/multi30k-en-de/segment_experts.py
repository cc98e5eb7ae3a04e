"""The experts by segments: the fast implementation for a CPU, which works on any device.

It sorts once, works on contiguous segments, and has a backward pass written by hand. It is fast for these reasons:

- Idle experts cost nothing in the forward pass, and slots of weight 0 (padding) are not computed.
- A gate's gradient is computed in the hidden space, w' = <dE/dh, h>, so expert outputs are not stored or scaled.
- Gradients are written into memory that is not cleared first, except the part of idle experts.
- In the backward pass, experts of few rows share the calls that work on each element.
- `embedding_bag` sums the k results of a token, once in the forward pass and once in the backward pass.
- In bfloat16 or float16 on a CPU, zero rows fill long segments up to a multiple of 32. oneDNN generates code for each
  new number of rows, which takes longer than the product.

Shape suffixes: T tokens, D width, E experts, K experts per token, H expert hidden size, R = T * K routed rows.
"""

from collections.abc import Iterator

import torch
from torch import nn

from .autocast import autocast_dtype
from .factored_gradients import RowGradients, row_gradients, row_owners, will_be_accumulated
from .few_tokens import few_tokens, is_few_on_cpu
from .native_experts import Visited, few_rows

# A separate namespace for each copy of this file, because a checkpoint from the Hub brings its own copy.
_NAMESPACE = __name__.replace(".", "_")
_ROWS_MULTIPLE = 32
_MIN_ROWS_TO_FILL = 128  # rows per expert, on average; shorter segments have few different lengths
_GROUP_ELEMENTS = 2**19  # in the inputs and hidden units of a group's rows; 2**17 to 2**21 differ little


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """Return the dtype that experts compute in: autocast's dtype, or without autocast the inputs' dtype."""
    return autocast_dtype(hidden_states.device) or hidden_states.dtype


def segment_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute `MoeExperts.forward` for one hidden layer of ReLU units, on any device.

    A slot whose weight is exactly 0 is skipped, so this weight gets no gradient. Second derivatives are not supported.
    """
    dtype, work_dtype, num_tokens = hidden_states.dtype, compute_dtype(hidden_states), len(hidden_states)
    is_half_on_cpu = hidden_states.device.type == "cpu" and work_dtype in (torch.bfloat16, torch.float16)
    if is_half_on_cpu and top_k_index.numel() >= _MIN_ROWS_TO_FILL * module.num_experts:
        filled = _fill_segments(hidden_states, top_k_index, top_k_weights, module.num_experts)
        hidden_states, top_k_index, top_k_weights = filled
    return _run(module, hidden_states.to(work_dtype), top_k_index, top_k_weights)[:num_tokens].to(dtype)


def _fill_segments(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append tokens of zeros whose slots bring the number of rows of each expert to a multiple of 32.

    The number of appended tokens does not depend on the routing; surplus slots do not belong to an expert.
    """
    k, experts_E = index.shape[1], torch.arange(num_experts)
    counts_E = index.masked_fill(weights == 0, num_experts).view(-1).bincount(minlength=num_experts)[:num_experts]
    is_needed = torch.arange(_ROWS_MULTIPLE - 1) < (-counts_E % _ROWS_MULTIPLE)[:, None]
    ids = torch.where(is_needed, experts_E[:, None], num_experts).view(-1)
    ids = nn.functional.pad(ids, (0, -len(ids) % k), value=num_experts).view(-1, k)
    return (
        torch.cat([x, x.new_zeros(len(ids), x.shape[1])]),
        torch.cat([index, ids]),
        torch.cat([weights, weights.new_ones(ids.shape)]),
    )


def _run(module: nn.Module, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    if module.factored_gradients and torch.is_grad_enabled() and module.up_proj.requires_grad:
        weights, owners = (module.up_proj, module.down_proj), row_owners(module)
        return _run_factored(x, top_k_index, top_k_weights, *weights, owners)
    up, down = module.up_proj.to(x.dtype), module.down_proj.to(x.dtype)
    if is_few_on_cpu(x, top_k_index):
        return few_tokens(x, top_k_index, top_k_weights, up, down)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, top_k_weights, up, down))
    output, *_ = _experts(x, top_k_index, top_k_weights, up, down, keep)
    return output


@torch.library.custom_op(f"{_NAMESPACE}::segment_experts", mutates_args=())
def _experts(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the experts from x (T, D), index and weights (T, K), up (E, H, D), down (E, D, H).

    Returns the output (T, D), and three tensors for the backward pass: the rows' hidden units (R, H), which are empty
    without `keep`, the slot of each row (R,), and the number of rows of each expert (E,).
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
    up_EDH, down_EHD = (_matrices(stack.mT, counts, limit) for stack in (up, down))
    one_hidden = {} if keep else {count: hidden_RH[:count] for count in set(counts)}
    for expert, rows, output, *kept in _segments(counts, limit, rows_RD, output_RD, *([hidden_RH] if keep else [])):
        hidden = kept[0] if keep else one_hidden[len(rows)]
        torch.mm(rows, up_EDH[expert].to(x.dtype), out=hidden)
        torch.mm(hidden.relu_(), down_EHD[expert].to(x.dtype), out=output)
    output = _sum_slots(output_RD, order_R, weights)
    return output, hidden_RH if keep else x.new_empty(0, num_hidden), order_R, counts_E


def _rows_for_kernels(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> int:
    """Return the largest number of rows of an expert for the compiled kernels."""
    fits = up.dtype == down.dtype == x.dtype and up.is_contiguous() and down.is_contiguous()
    return few_rows(x.dtype, x.device, up.shape[2], up.shape[1]) if fits else 0


def _matrices(stack: torch.Tensor, counts: list[int], limit: int) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return the matrices (E, M, N), to be indexed by expert: as views from one call, unless few experts are used."""
    return stack.unbind() if 4 * sum(count > limit for count in counts) >= len(counts) else stack


def _segments(counts: list[int], limit: int, *tensors: torch.Tensor) -> Iterator[tuple]:
    """Yield, for each expert with more than `limit` rows, its id and its rows of each of the tensors (R, ...).

    One call creates the views of all experts. Created one by one, they would take as long as products of a few rows.
    """
    if max(counts, default=0) <= limit:
        return
    visited = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in visited]
    views = (tensor[: sum(sizes)].split(sizes) for tensor in tensors)
    for expert, size, *rows in zip(visited, sizes, *views):
        if size > limit:
            yield expert, *rows


def _groups(counts: list[int], limit: int, max_rows: int) -> Iterator[tuple[list[int], range]]:
    """Yield the ids and the rows of successive experts, for operations on their rows at once.

    A group has at most `max_rows` rows, or one expert. All its experts have more than `limit` rows, or none has. Idle
    experts are left out.
    """
    experts, start, stop = [], 0, 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        is_alike = experts and (counts[experts[0]] > limit) == (count > limit)
        if experts and not (is_alike and stop + count - start <= max_rows):
            yield experts, range(start, stop)
            experts, start = [], stop
        experts.append(expert)
        stop += count
    if experts:
        yield experts, range(start, stop)


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
    """Write `grad_up` and `grad_down`, unless they are None.

    Returns the gradients with respect to x and weights. For factored gradients of the experts, also returns the
    weighted gradients at the outputs (R, D), the gradients at the hidden units (R, H), and the inputs (R, D).
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
    groups = list(_groups(counts, limit, _GROUP_ELEMENTS // (up.shape[1] + up.shape[2])))
    keeps_all = is_factored or limit > 0
    grad_RH = x.new_empty(num_rows if keeps_all else max((len(rows) for _, rows in groups), default=0), up.shape[1])
    if limit:
        outputs = (grad_RD, grad_RH, grad_weights_R, grad_rows_RD)
        Visited(counts_E, limit).backward(up, down, hidden_RH, weights_R, *outputs)
    up_EHD, down_EDH = (_matrices(stack, counts, limit) for stack in (up, down))
    if not is_factored:
        idle = (counts_E == 0).nonzero()[:, 0]
        of_up, of_down = (_matrices(grads.index_fill_(0, idle, 0), counts, 0) for grads in (grad_up, grad_down))
    for experts, rows in groups:
        is_done = counts[experts[0]] <= limit  # by the kernels
        if is_done and is_factored:
            continue
        here, sizes = slice(rows.start, rows.stop), [counts[expert] for expert in experts]
        grad_GH, hidden_GH = grad_RH[here if keeps_all else slice(len(rows))], hidden_RH[here]
        tensors = (grad_GH, grad_RD[here], grad_rows_RD[here], hidden_GH, rows_RD[here])
        segments = list(zip(experts, *(tensor.split(sizes) for tensor in tensors)))
        if not is_done:
            for expert, grad_hidden, grads, *_ in segments:
                torch.mm(grads, down_EDH[expert].to(x.dtype), out=grad_hidden)
            torch.sum(grad_GH * hidden_GH, dim=1, out=grad_weights_R[here])
            grad_RD[here].mul_(weights_R[here, None])
            grad_GH.mul_(weights_R[here, None])
            torch.ops.aten.threshold_backward.grad_input(grad_GH, hidden_GH, 0, grad_input=grad_GH)
        for expert, grad_hidden, grads, grad_rows, hidden, inputs in segments:
            if not is_done:
                torch.mm(grad_hidden, up_EHD[expert].to(x.dtype), out=grad_rows)
            if not is_factored:
                torch.mm(grads.t(), hidden, out=of_down[expert])
                torch.mm(grad_hidden.t(), inputs, out=of_up[expert])
    grad_weights.view(-1)[order_R[:num_rows]] = grad_weights_R.to(weights.dtype)
    return _sum_slots(grad_rows_RD, order_R, weights, weigh=False), grad_weights, grad_RD, grad_RH, rows_RD


class _FactoredExperts(torch.autograd.Function):
    """The same forward pass; the backward pass stores the experts' gradients as rows on their parameters, `owners`."""

    @staticmethod
    def forward(ctx, x, index, weights, up, down, owners):
        output, *kept = _experts(x, index, weights, up, down, True)
        ctx.save_for_backward(x, weights, *kept)
        ctx.parameters, ctx.owners = (up, down), owners
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
        of_up = RowGradients(grad_RH, rows_RD, counts_E)
        of_down = RowGradients(grad_RD, hidden_RH[: len(rows_RD)], counts_E)
        for owner, edge, rows in zip(ctx.owners, ctx.next_functions[3:5], (of_up, of_down)):
            if will_be_accumulated(edge):
                owner.row_gradients = [*row_gradients(owner), rows]
        return grad_x, None, grad_weights, None, None, None


# A compiled graph cannot store rows on a parameter.
_run_factored = torch.compiler.disable(_FactoredExperts.apply)


def _sort(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slots (R,) sorted by expert, uncomputed slots last, and the computed slots of each expert (E,)."""
    small = torch.int16 if num_experts < 2**15 - 1 else torch.int32
    ids_R = index.clamp(max=num_experts).masked_fill(weights == 0, num_experts).view(-1)
    counts_E = ids_R.bincount(minlength=num_experts + 1)[:num_experts]
    return ids_R.to(small).argsort(stable=True), counts_E


def _sum_slots(
    rows_RD: torch.Tensor, order_R: torch.Tensor, weights: torch.Tensor, weigh: bool = True
) -> torch.Tensor:
    """Return (T, D), the sum of each token's K rows, optionally weighted by `weights` (T, K); rows are by expert."""
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
