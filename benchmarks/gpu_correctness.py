"""Compares a GPU's results with float64 on a CPU, and tries what has failed elsewhere: for benchmarks/gpu.py."""

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from gpu_place import Case, Place, float32_precision
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_hf import (
    GnmtMoeConfig,
    GnmtMoeForConditionalGeneration,
    LstmMoeConfig,
    LstmMoeForCausalLM,
    MoeExperts,
    SoftmaxTopKGate,
)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GATES = {
    "flat": {},
    "hierarchical": {"num_expert_groups": 4, "num_experts_per_tok": 4},
    "strictly balanced": {"gating": "strictly_balanced"},
    "softmax": {"gating": "softmax_top_k"},
    "softmax, projected LSTM": {"gating": "softmax_top_k", "lstm_hidden_size": 96},
}
AUTOCAST = {"bfloat16 autocast": torch.bfloat16, "float16 autocast": torch.float16}
WEIGHTS = {"bfloat16 weights": torch.bfloat16, "float16 weights": torch.float16}
# Largest relative error. Rounding changes the experts of a few tokens, so the median token is judged. Rounding also
# switches a few hidden units of experts on or off.
LIMITS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
IMPLEMENTATIONS = ("moe_hf", "triton", "grouped_mm", "batched_mm", "eager")


def implementations(place: Place) -> list[str]:
    """Lists the experts implementations that work here; Triton may be missing, and runs interpreted on a CPU."""
    names = [name for name in IMPLEMENTATIONS if name == "eager" or name in ALL_EXPERTS_FUNCTIONS]
    runs_triton = place.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not (runs_triton and importlib.util.find_spec("triton")):
        names = [name for name in names if name != "triton"]
    return names


def language_model(**changes) -> LstmMoeForCausalLM:
    """A small language model, drawn from a fixed seed, whose gates are not zero."""
    sizes = dict(vocab_size=200, hidden_size=64, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128)
    torch.manual_seed(0)
    return with_gates(LstmMoeForCausalLM(LstmMoeConfig(**(sizes | TOKENS | {"dropout": 0.0} | changes))))


def translation_model(**changes) -> GnmtMoeForConditionalGeneration:
    """A small translation model, drawn from a fixed seed, whose gates are not zero."""
    sizes = dict(vocab_size=200, hidden_size=64, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128)
    values = sizes | TOKENS | {"dropout": 0.0, "decoder_start_token_id": 1} | changes
    torch.manual_seed(0)
    return with_gates(GnmtMoeForConditionalGeneration(GnmtMoeConfig(**values)))


FAMILIES = {"language model": language_model, "translation": translation_model}


def with_gates(model):
    """Draws the gates' weights at random: gates start at zero, and equal logits do not choose experts."""
    for name, weight in model.named_parameters():
        if ".gate." in name and "threshold" not in name:
            torch.nn.init.normal_(weight, std=0.5 if "noise" not in name else 0.05)
    return model


def batch(device: torch.device, padded: bool = False, rows: int = 8, length: int = 20) -> dict[str, torch.Tensor]:
    """Returns token ids, labels, and a mask with padding on the left, on the right and in between."""
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(1))
    values = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = mask[1, length // 2 :] = mask[2, 4:9] = 0
        values |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.to(device) for name, value in values.items()}


@contextmanager
def noise_of_the_token():
    """Makes the gating noise a function of the logits, so that every device and dtype gets the same noise."""
    drawn = torch.randn_like
    torch.randn_like = lambda logits, **_: torch.sin(3 * logits.detach())
    try:
        yield
    finally:
        torch.randn_like = drawn


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def compared(error: float, limit: float) -> dict:
    return {"relative error": error, "limit": limit, "ok": bool(error <= limit)}


def judged(error: float, precision: str, **values) -> dict:
    """Returns the columns of a comparison."""
    return compared(error, LIMITS[precision]) | values


def models(place: Place) -> Iterator[Case]:
    """Compares logits in evaluation and gradients in training of both families with float64 on the CPU."""
    kinds = product(FAMILIES, place.size(GATES, {"flat": GATES["flat"]}), (False, True))
    for family, gate, padded in kinds:
        reference = FAMILIES[family](**GATES[gate]).double()
        reference.set_experts_implementation("eager")
        name = f"{family}, {gate}{', padded' if padded else ''}"
        ways = ("float32", *AUTOCAST, *WEIGHTS) if padded else ("float32", "bfloat16 autocast")
        for how in place.size(ways, ways[:2]):
            yield Case(f"{name}: logits, {how}", lambda how=how: logits_error(place, reference, padded, how))
        for how in place.size(("float32", "bfloat16 autocast"), ("float32",)):
            yield Case(f"{name}: gradients, {how}", lambda how=how: gradient_error(place, reference, padded, how))


def on_device(place: Place, reference, how: str):
    """Returns a copy of a model on the device, and the context that the copy runs in."""
    model = copy.deepcopy(reference).to(place.device, WEIGHTS.get(how, torch.float32))
    model.set_experts_implementation("moe_hf")
    return model, place.autocast(AUTOCAST.get(how))


def logits_error(place: Place, reference, padded: bool, how: str) -> dict:
    model, autocast = on_device(place, reference, how)
    cpu = batch(torch.device("cpu"), padded)
    real = cpu["labels"] != -100
    with torch.no_grad(), float32_precision("ieee"):
        expected = reference.eval()(**cpu).logits[real]
        with autocast:
            actual = model.eval()(**batch(place.device, padded)).logits.double().cpu()[real]
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    precision = how.split()[0]
    error = errors.max() if precision == "float32" else errors.median()
    return judged(error.item(), precision, **{"worst token": errors.max().item()})


def gradient_error(place: Place, reference, padded: bool, how: str) -> dict:
    model, autocast = on_device(place, reference, how)
    reference.zero_grad()
    with noise_of_the_token(), float32_precision("ieee"):
        reference.train()(**batch(torch.device("cpu"), padded)).loss.backward()
        with autocast:
            loss = model.train()(**batch(place.device, padded)).loss
        loss.backward()
    expected = dict(reference.named_parameters())
    errors = {n: relative_error(p.grad, expected[n].grad) for n, p in model.named_parameters()}
    worst = max(errors, key=errors.get)
    flat = [torch.cat([p.grad.double().cpu().flatten() for p in m.parameters()]) for m in (model, reference)]
    # A token whose experts change by rounding affects every gradient.
    limit = LIMITS["float32"] if how == "float32" else 0.5
    error = relative_error(*flat)
    return compared(error, limit) | {"worst": f"{errors[worst]:.2g} {worst}"}


def experts(place: Place) -> Iterator[Case]:
    """Compares outputs and gradients of each implementation with "eager" in float64, with idle experts and padding."""
    for dtype in place.size((torch.float32, torch.bfloat16, torch.float16), (torch.float32,)):
        for num_experts in place.size((40, 1023, 1100), (12,)):
            for name in implementations(place):
                label = f"{name}, {num_experts} experts, {str(dtype)[6:]}"
                yield Case(label, lambda a=(name, num_experts, dtype): experts_error(place, *a))


def experts_error(place: Place, name: str, num_experts: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, moe_intermediate_size=128, num_experts=num_experts, num_experts_per_tok=4)
    module = MoeExperts(LstmMoeConfig(vocab_size=8, **sizes)).to(dtype)
    x, grad = torch.randn(2, 96, 64).to(dtype)
    index = torch.rand(96, num_experts).topk(4).indices
    index[index % 5 == 0] = 1  # every fifth expert is idle
    weights = torch.rand(96, 4).to(dtype)
    weights[:10] = 0  # padding

    def run(module, device, dtype, implementation) -> list[torch.Tensor]:
        module = copy.deepcopy(module).to(device, dtype)
        module.config._experts_implementation_internal = implementation
        inputs, scale = (t.to(device, dtype).detach().requires_grad_() for t in (x, weights))
        output = module(inputs, index.to(device), scale)
        output.backward(grad.to(device, dtype))
        # Leaves out slots of weight 0: an implementation may skip them, and their gradients then stay zero.
        kept = scale.grad.masked_fill(scale == 0, 0)
        return [output, inputs.grad, kept, module.up_proj.grad, module.down_proj.grad]

    with float32_precision("ieee"):
        actual = run(module, place.device, dtype, name)
    expected = run(module, torch.device("cpu"), torch.float64, "eager")
    errors = [relative_error(*pair) for pair in zip(actual, expected)]
    values = dict(zip(("output", "x", "weights", "up_proj", "down_proj"), errors))
    idle = [i for i in range(num_experts) if i % 5 == 0]
    largest = max(tensor[idle].abs().max().item() for tensor in actual[3:])
    result = judged(max(errors), str(dtype)[6:], **values, **{"idle experts": largest})
    return result | {"ok": result["ok"] and largest == 0}


def behaviour(place: Place) -> Iterator[Case]:
    """Runs what has failed on GPUs, or was predicted to fail; these cases only have to work."""
    for num_experts in place.size((1023, 1024, 4096), (20,)):
        sizes = dict(num_experts=num_experts)
        yield Case(f"bfloat16 weights, {num_experts} experts", training_step(place, torch.bfloat16, **sizes))
    for changes in ({"hidden_size": 20}, {"num_sampled": 50}, {"loss_chunk_size": 64}, {"recompute_experts": True}):
        text = ", ".join(f"{name} {value}" for name, value in changes.items())
        yield Case(f"training step, {text}", training_step(place, torch.float32, **changes))
    yield Case("backward pass in evaluation mode", training_step(place, torch.float32, is_training=False))
    yield Case("LSTM under bfloat16 autocast, gradient of a small loss", lambda: small_loss(place))
    yield Case("gate's choices with TF32", lambda: choices_with_tf32(place))
    yield Case("strictly balanced, no token passes", lambda: no_token_passes(place))
    yield Case("float16 with a scaler, an overflow", lambda: float16_overflow(place))
    yield Case("deterministic algorithms, two runs", lambda: deterministic(place))
    for family in FAMILIES:
        for options in ({}, {"num_beams": 4}, {"cache_implementation": "static"}):
            text = ", ".join(f"{name} {value}" for name, value in options.items()) or "greedy"
            yield Case(f"generate, {family}, {text}", lambda a=(family, options): same_tokens(place, *a))


def training_step(place: Place, dtype: torch.dtype, is_training: bool = True, **changes) -> Callable[[], dict]:
    def run() -> dict:
        model = language_model(**changes).to(place.device, dtype).train(is_training)
        loss = model(**batch(place.device)).loss
        loss.backward()
        return {"ok": all(p.grad.isfinite().all().item() for p in model.parameters() if p.grad is not None)}

    return run


def small_loss(place: Place) -> dict:
    """Checks gradients of a loss divided by 2.5 million tokens, the paper's step; float16 would flush them to 0."""
    model, gradients = language_model(gating="softmax_top_k").to(place.device).train(), []
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        with place.autocast(dtype):
            loss = model(**batch(place.device), num_items_in_batch=torch.tensor(2_500_000, device=place.device)).loss
        loss.backward()
        gradients.append(model.model.layers[0].weight_hh.grad.clone())
    error = relative_error(*gradients[::-1])
    return compared(error, 0.2)


def choices_with_tf32(place: Place) -> dict:
    """Checks that a float32 gate chooses the same experts whether or not other products may use TF32."""
    torch.manual_seed(0)
    gate = SoftmaxTopKGate(512, 256, 4).to(place.device)
    torch.nn.init.normal_(gate.weight)
    x, choices = torch.randn(place.size(16384, 64), 512, device=place.device), []
    for precision in ("ieee", "tf32"):
        with torch.no_grad(), float32_precision(precision):
            choices.append(gate(x).top_k_index)
    changed = (choices[0] != choices[1]).any(dim=1).double().mean().item()
    return {"tokens that choose otherwise": changed, "ok": changed == 0}


def no_token_passes(place: Place) -> dict:
    model = language_model(gating="strictly_balanced").to(place.device).eval()
    with torch.no_grad():
        model.model.layers[1].gate.threshold.fill_(2.0)
        return {"ok": model(**batch(place.device)).logits.isfinite().all().item()}


def float16_overflow(place: Place) -> dict:
    """Checks that a loss scale that is too large skips the step and is halved, and that a later step succeeds."""
    model = language_model().to(place.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**40)
    for _ in range(40):
        with place.autocast(torch.float16):
            loss = model(**batch(place.device)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    finite = all(p.isfinite().all().item() for p in model.parameters())
    return {"loss after": loss.item(), "scale after": scaler.get_scale(), "ok": finite and loss.isfinite().item()}


def deterministic(place: Place) -> dict:
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model = language_model().to(place.device).train()
            torch.manual_seed(3)
            model(**batch(place.device)).loss.backward()
            runs.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    return {"ok": torch.equal(*runs)}


def same_tokens(place: Place, family: str, options: dict) -> dict:
    """Checks that float32 generation with the default cache chooses the same tokens as on the CPU."""
    generated, plain = [], {name: value for name, value in options.items() if name != "cache_implementation"}
    for device, how in ((torch.device("cpu"), plain), (place.device, options)):
        model = FAMILIES[family]().eval().to(device)
        with float32_precision("ieee"):
            ids = batch(device, rows=4)["input_ids"]
            generated.append(model.generate(ids, max_new_tokens=8, do_sample=False, **how).cpu())
    return {"ok": torch.equal(*generated)}
