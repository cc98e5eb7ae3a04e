"""How fast the layers are, each beside the matrix products that it needs at least: for benchmarks/gpu.py."""

import sys
from collections.abc import Callable, Iterator

import torch
from gpu_correctness import implementations
from gpu_place import Case, Place, float32_precision
from torch import nn

from moe_hf import HierarchicalGate, LstmMoeConfig, MoeExperts, NoisyTopKGate, SoftmaxTopKGate, StrictlyBalancedGate
from moe_hf.models.balancing import balancing_loss
from moe_hf.models.lstm import LstmLayer
from moe_hf.models.segment_experts import segment_experts_forward

K = 4
# Tokens, experts, width, hidden units of an expert.
EXPERTS = [(16384, 32, 512, 1024), (16384, 256, 512, 1024), (16384, 1000, 512, 1024), (16384, 4096, 512, 256)]
WIDE = [(16384, 32, 1024, 4096)]
FEW = [(tokens, num_experts, 512, 1024) for num_experts in (32, 256) for tokens in (1, 8, 64, 256)]
TINY = [(16, 8, 16, 16)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The segment backend and "eager" launch some kernels for each expert.
MOST_EXPERTS_OF_LOOPS = 256
MOST_BYTES_OF_COPIES = 8e9  # batched_mm copies the weights of both layers for every slot


def experts(place: Place) -> Iterator[Case]:
    """Times the forward and backward pass of the experts alone, over a dense layer with as many active operations."""
    for sizes in place.size(EXPERTS + WIDE, TINY):
        for dtype in place.size(DTYPES, (torch.float32,)):
            yield from compare(place, sizes, dtype, with_backward=True)


def few_tokens(place: Place) -> Iterator[Case]:
    """Times the forward pass alone, for as few tokens as generation has."""
    for sizes in place.size(FEW, TINY):
        for dtype in place.size((torch.bfloat16, torch.float32), (torch.float32,)):
            yield from compare(place, sizes, dtype, with_backward=False)


def limits(sections: dict) -> dict:
    """Derives from the two tables of experts which implementation to choose, in bfloat16.

    Args:
        sections: the results of benchmarks/gpu.py.

    Returns:
        batched_mm_rows: the largest number of routed rows at which batched_mm was the fastest without gradients; 0 if
            batched_mm was never the fastest.
        grouped_mm_rows: the smallest number of rows per expert from which grouped_mm was always faster than triton
            with gradients; None if triton was faster in the largest case, or if either of the two is missing.
    """
    few = _times(sections, "experts, few tokens", "rows", ("batched_mm", "triton", "grouped_mm"))
    batched = [rows for rows, times in few if len(times) > 1 and min(times, key=times.get) == "batched_mm"]
    grouped = None
    for rows, times in sorted(_times(sections, "experts", "rows an expert", ("triton", "grouped_mm")), reverse=True):
        if len(times) < 2 or times["triton"] < times["grouped_mm"]:
            break
        grouped = rows
    return {"batched_mm_rows": max(batched, default=0), "grouped_mm_rows": grouped}


def _times(sections: dict, name: str, by: str, names: tuple[str, ...]) -> list[tuple[float, dict[str, float]]]:
    """Returns, for each size in bfloat16, its number of rows and the milliseconds of each implementation that ran."""
    sizes: dict[str, tuple[float, dict[str, float]]] = {}
    for case in sections.get(name, {}).get("cases", ()):
        if case.get("by") in names and case["type"] == "bfloat16":
            sizes.setdefault(case["case"].partition(": ")[2], (case[by], {}))[1][case["by"]] = case["ms"]
    return list(sizes.values())


def compare(place: Place, sizes: tuple[int, int, int, int], dtype: torch.dtype, with_backward: bool) -> Iterator[Case]:
    """Yields a case for the dense layer first, then one for each implementation."""
    tokens, num_experts, width, hidden = sizes
    label = f"{tokens:,} tokens, {num_experts:,} experts, d = {width}, h = {hidden:,}, {str(dtype)[6:]}"
    rows = tokens * K
    flops = 2 * rows * 2 * width * hidden * (3 if with_backward else 1)
    dense_ms: list[float] = []

    def run(name: str) -> dict:
        torch.manual_seed(0)
        inputs = torch.randn(tokens, width, device=place.device, dtype=dtype, requires_grad=with_backward)
        if name == "dense":
            layer = nn.Sequential(nn.Linear(width, K * hidden), nn.ReLU(), nn.Linear(K * hidden, width))
            layer.to(place.device, dtype)
            forward, leaves = lambda: layer(inputs), [inputs, *layer.parameters()]
        else:
            forward, leaves = sparse_layer(place, name, sizes, inputs)
        step = forward_and_backward(forward, leaves) if with_backward else torch.no_grad()(forward)
        with float32_precision("ieee"):
            time = place.milliseconds(step)
            values = {
                "by": name,
                "rows": tokens * K,
                "rows an expert": tokens * K / num_experts,
                "type": str(dtype)[6:],
            }
            values |= {"ms": time, "TFLOP/s": flops / time / 1e9}
            if with_backward:
                values |= {"peak GB": place.peak_gb(step), "kernels": place.kernels(step)[0]}
        if name == "dense":
            dense_ms.append(time)
        return values | ({"over dense": time / dense_ms[0]} if dense_ms else {})

    for name in ("dense", *implementations(place), "segments", *(["scattermoe"] if place.scattermoe else [])):
        if name in ("segments", "eager") and num_experts > MOST_EXPERTS_OF_LOOPS:
            continue
        if name == "batched_mm" and tokens * K * 2 * width * hidden * dtype.itemsize > MOST_BYTES_OF_COPIES:
            continue
        yield Case(f"{name}: {label}", lambda name=name: run(name))


def sparse_layer(place: Place, name: str, sizes: tuple[int, int, int, int], inputs: torch.Tensor):
    """Returns the forward pass of an implementation with uniform routing, and the tensors that get gradients."""
    tokens, num_experts, width, hidden = sizes
    config = LstmMoeConfig(
        vocab_size=8,
        hidden_size=width,
        num_experts=num_experts,
        num_experts_per_tok=K,
        moe_intermediate_size=hidden,
    )
    config._experts_implementation_internal = "eager" if name in ("segments", "scattermoe") else name
    with torch.device(place.device):
        module = MoeExperts(config).to(inputs.dtype)
    weights, index = torch.randn(tokens, num_experts, device=place.device).topk(K)
    weights = weights.softmax(dim=-1).to(inputs.dtype).detach().requires_grad_(inputs.requires_grad)
    leaves = [inputs, weights, *module.parameters()]
    if name == "segments":
        return lambda: segment_experts_forward(module, inputs, index, weights), leaves
    if name == "scattermoe":
        return scattermoe_layer(place, module, inputs, index, weights), leaves
    return lambda: module(inputs, index, weights), leaves


def scattermoe_layer(place: Place, module: MoeExperts, inputs, index, weights) -> Callable:
    """Returns the same computation with scattermoe's two grouped products."""
    if str(place.scattermoe) not in sys.path:
        sys.path.insert(0, str(place.scattermoe))
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def forward():
        sorted_experts, order, offsets = flatten_sort_count(index, module.num_experts)
        up, down, sorted_ = module.up_proj.permute(0, 2, 1), module.down_proj.permute(0, 2, 1), (sorted_experts, order)
        hidden = parallel_linear(inputs, up, K, *sorted_, offsets, grouped_out=True).relu()
        return parallel_linear(hidden, down, 1, *sorted_, offsets, grouped_in=True, gates=weights)

    return forward


def forward_and_backward(forward: Callable, leaves: list[torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        output = forward()
        output.backward(torch.ones_like(output))

    return step


def lstm(place: Place) -> Iterator[Case]:
    """Times an LSTM layer, forward and backward, over matrix products of the same shapes, step after step."""
    # Rows, length, width, units of a projected cell.
    shapes = [(512, 32, 512, None), (512, 32, 512, 2048), (64, 64, 1024, None)]
    for shape in place.size(shapes, [(2, 4, 16, None)]):
        for dtype in place.size(DTYPES, (torch.float32,)):
            for padded in (False, True):
                name = "B = {}, S = {}, d = {}, units = {}".format(*shape)
                name += f", {str(dtype)[6:]}{', padded' if padded else ''}"
                yield Case(name, lambda a=(shape, dtype, padded): lstm_layer(place, *a))


def lstm_layer(place: Place, shape: tuple, dtype: torch.dtype, padded: bool) -> dict:
    rows, length, width, units = shape
    config = LstmMoeConfig(hidden_size=width, lstm_hidden_size=units, dropout=0.0, layer_pattern=["lstm"])
    layer = LstmLayer(config).to(place.device, dtype).train()
    x = torch.randn(rows, length, width, device=place.device, dtype=dtype, requires_grad=True)
    mask = None
    if padded:
        lengths = torch.randint(length // 2, length + 1, (rows, 1), device=place.device)
        mask = torch.arange(length, device=place.device) < lengths
    h, c = x.detach()[:, 0], x.new_zeros(rows, units or width)

    @torch.no_grad()
    def products() -> None:
        for _ in range(3):
            x.view(-1, width) @ layer.weight_ih.t()
            for _ in range(length):
                h @ layer.weight_hh.t()
                if layer.weight_hr is not None:
                    c @ layer.weight_hr.t()

    step = forward_and_backward(lambda: layer(x, mask)[0], [x, *layer.parameters()])
    with float32_precision("ieee"):
        time, least = place.milliseconds(step), place.milliseconds(products)
        launches, _ = place.kernels(step)
    return {"ms": time, "over its products": time / least, "kernels": launches, "tokens/s": 1e3 * rows * length / time}


def gates(place: Place) -> Iterator[Case]:
    """Times the forward and backward pass of the gates with their balancing losses, in float32."""
    tokens, width = place.size((16384, 512), (16, 16))
    for num_experts, groups in place.size([(256, 16), (1024, 32), (4096, 64), (16384, 128)], [(16, 4)]):
        kinds = {
            "noisy": lambda n: NoisyTopKGate(width, n, K),
            "softmax": lambda n: SoftmaxTopKGate(width, n, K),
            "strictly balanced": lambda n: StrictlyBalancedGate(width, n, K),
            f"hierarchical, {groups} groups": lambda n, groups=groups: HierarchicalGate(width, n, K, groups),
        }
        for name, build in kinds.items():
            label = f"{name}, {num_experts:,} experts, {tokens:,} tokens"
            yield Case(label, lambda a=(build, num_experts, tokens, width): one_gate(place, *a))


def one_gate(place: Place, build: Callable, num_experts: int, tokens: int, width: int) -> dict:
    torch.manual_seed(0)
    gate = build(num_experts).to(place.device).train()
    for name, weight in gate.named_parameters():
        if name != "threshold":
            nn.init.normal_(weight, std=width**-0.5)
    x = torch.randn(tokens, width, device=place.device, requires_grad=True)
    leaves = [x, *gate.parameters()]

    def loss() -> torch.Tensor:
        routed = gate(x)
        balance = balancing_loss(routed.importance, routed.load, 0.1, 0.1)
        extra = 0 if routed.threshold_loss is None else routed.threshold_loss
        return routed.top_k_weights.square().sum() + balance + extra

    step = forward_and_backward(loss, leaves)
    with float32_precision("ieee"):
        time, peak = place.milliseconds(step), place.peak_gb(step)
        launches, _ = place.kernels(step)
    waits = sum(place.host_reads(step).values())
    return {"ms": time, "kernels": launches, "host reads": waits, "peak GB": peak}
