"""Speed of training and generation, host waits and memory of whole models: for benchmarks/gpu.py."""

import time
from collections.abc import Callable, Iterator

import torch
from gpu_place import Case, Place, float32_precision

from moe_hf import (
    FactoredAdam,
    GnmtMoeConfig,
    GnmtMoeForConditionalGeneration,
    LstmMoeConfig,
    LstmMoeForCausalLM,
    clip_grad_norm_,
    use_factored_gradients,
)
from moe_hf.evaluation import ops_per_timestep

# Models of table 7, which have the same number of operations per token.
LANGUAGE_MODELS = {
    "MoE-1-Wide": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 4096},
    "4xLSTM-512": {"layer_pattern": ["lstm"] * 4},
    "MoE-32": {"num_experts": 32},
    "MoE-256": {"num_experts": 256},
    "MoE-256-h": {"num_experts": 256, "num_expert_groups": 16},
    "MoE-1024-h": {"num_experts": 1024, "num_expert_groups": 16},
}
TRANSLATION = {
    "MoE-32, recurrent feeding": {},
    "MoE-32, parallel feeding": {"attention_feeding": "parallel"},
    "MoE-32, strictly balanced": {"attention_feeding": "parallel", "gating": "strictly_balanced"},
}
HOW = ("bfloat16 autocast", "TF32", "float32")
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def language_model(place: Place, **changes) -> LstmMoeForCausalLM:
    sizes = dict(vocab_size=32000, num_sampled=1024, hidden_size=512, moe_intermediate_size=1024)
    tiny = dict(vocab_size=50, num_sampled=20, hidden_size=16, moe_intermediate_size=16)
    values = place.size(sizes, tiny) | TOKENS | {"num_experts_per_tok": 4} | changes
    if place.is_tiny:
        values |= {"moe_intermediate_size": 16, "num_experts": min(16, values.get("num_experts", 16))}
        values |= {"num_expert_groups": 4} if values.get("num_expert_groups") else {}
    with torch.device(place.device):
        return LstmMoeForCausalLM(LstmMoeConfig(**values))


def translation_model(place: Place, **changes) -> GnmtMoeForConditionalGeneration:
    sizes = dict(vocab_size=32000, hidden_size=512, moe_intermediate_size=2048, num_experts=32)
    tiny = dict(vocab_size=50, hidden_size=16, moe_intermediate_size=16, num_experts=8)
    values = place.size(sizes, tiny) | TOKENS | {"decoder_start_token_id": 1} | changes
    with torch.device(place.device):
        return GnmtMoeForConditionalGeneration(GnmtMoeConfig(**values))


def random_batch(place: Place, model, padded: bool = False) -> dict[str, torch.Tensor]:
    rows, length = place.size((512, 32), (2, 6))
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=place.device)
    values = {"input_ids": ids, "labels": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[::2, -length // 4 :] = 0
        values |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return values


def training_step(place: Place, model, how: str, optimizer=None, padded: bool = False) -> Callable[[], None]:
    """Returns a training step: forward and backward pass, clipping and update."""
    model.train()
    fused = {"fused": True} if place.is_cuda else {}
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, **fused)
    inputs = random_batch(place, model, padded)

    def step() -> None:
        with place.autocast(torch.bfloat16 if how == "bfloat16 autocast" else None):
            loss = model(**inputs).loss
        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(place: Place) -> Iterator[Case]:
    """Measures tokens per second of whole steps with AdamW; for language models also over MoE-1-Wide."""
    for how in place.size(HOW, HOW[:1]):
        wide: list[float] = []
        for name, changes in place.size(LANGUAGE_MODELS, dict(list(LANGUAGE_MODELS.items())[::3])).items():
            yield Case(f"{name}, {how}", lambda a=(changes, how, wide): train_language_model(place, *a))
        for name, changes in place.size(TRANSLATION, {"recurrent feeding": {}}).items():
            yield Case(f"translation, {name}, {how}", lambda a=(changes, how): train_translation(place, *a))


def train_language_model(place: Place, changes: dict, how: str, wide: list[float]) -> dict:
    model = language_model(place, **changes)
    values = step_numbers(place, training_step(place, model, how), how, model)
    wide.append(values["tokens/s"])
    teraflops = 6e-12 * ops_per_timestep(model.config) * values["tokens/s"]
    return values | {"over MoE-1-Wide": values["tokens/s"] / wide[0], "TFLOP/s": teraflops}


def train_translation(place: Place, changes: dict, how: str) -> dict:
    model = translation_model(place, **changes)
    return step_numbers(place, training_step(place, model, how, padded=True), how, model)


def step_numbers(place: Place, step: Callable, how: str, model) -> dict:
    rows, length = place.size((512, 32), (2, 6))
    with float32_precision("tf32" if how == "TF32" else "ieee"):
        milliseconds = place.milliseconds(step, 10)
        launches, busy = place.kernels(step)
    return {
        "M parameters": model.num_parameters() / 1e6,
        "ms": milliseconds,
        "tokens/s": 1e3 * rows * length / milliseconds,
        "kernels": launches,
        "busy": busy / milliseconds,
    }


def host_reads(place: Place) -> Iterator[Case]:
    """Counts how often a training step or a generated token makes the host wait for the device, and where most."""
    kinds = {
        "language model, flat": lambda: language_model(place, num_experts=32),
        "language model, hierarchical": lambda: language_model(place, num_experts=32, num_expert_groups=8),
        "language model, strictly balanced": lambda: language_model(place, gating="strictly_balanced"),
        "translation": lambda: translation_model(place),
    }
    for name, build in kinds.items():
        for padded in place.size((False, True), (True,)):
            label = f"training step, {name}{', padded' if padded else ''}"
            yield Case(label, lambda a=(build, padded): reads_of_training(place, *a))
    for name in ("language model, flat", "translation"):
        yield Case(f"token, {name}", lambda build=kinds[name]: reads_of_generation(place, build()))


def reads_of_training(place: Place, build: Callable, padded: bool) -> dict:
    step = training_step(place, build(), "bfloat16 autocast", padded=padded)
    step()
    waits = place.host_reads(step)
    return {"host reads": sum(waits.values()), "where": places(waits)}


def reads_of_generation(place: Place, model) -> dict:
    """Returns the host reads per generated token, as a mean over eight more tokens."""
    model.eval()
    ids = random_batch(place, model)["input_ids"][:4]
    runs = [place.host_reads(generation(model, ids, tokens)) for tokens in (4, 4, 12)]
    more = {line: (count - runs[1][line]) / 8 for line, count in runs[2].items() if count > runs[1][line]}
    return {"host reads": sum(more.values()), "where": places(more)}


def places(waits: dict) -> str:
    most = sorted(waits.items(), key=lambda item: -item[1])[:5]
    return " ".join(f"{line} x{count:g}" for line, count in most)


def generation(model, ids: torch.Tensor, tokens: int, **options) -> Callable[[], torch.Tensor]:
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return lambda: model.generate(ids, **lengths, do_sample=False, **options)


def decoding(place: Place) -> Iterator[Case]:
    """Measures the milliseconds of a generated token, without the time of the prompt."""
    for family, build in (("language model, MoE-32", language_model), ("translation, MoE-32", translation_model)):
        for rows in place.size((1, 64), (2,)):
            for dtype in place.size((torch.bfloat16, torch.float32), (torch.float32,)):
                # A static cache may trigger a compilation, which takes half a minute.
                is_first = (rows, dtype) == place.size((1, torch.bfloat16), (2, torch.float32))
                for options in ({}, {"num_beams": 4}, *([{"cache_implementation": "static"}] if is_first else [])):
                    text = ", ".join(f"{name} {value}" for name, value in options.items()) or "greedy"
                    label = f"{family}, {rows} rows, {text}, {str(dtype)[6:]}"
                    yield Case(label, lambda a=(build, rows, dtype, options): decode(place, *a))


def decode(place: Place, build: Callable, rows: int, dtype: torch.dtype, options: dict) -> dict:
    model = build(place).to(dtype).eval()
    ids = random_batch(place, model)["input_ids"][:rows, :12]
    tokens, seconds = place.size(32, 2), []
    for length in (tokens, 3 * tokens):
        run = generation(model, ids, length, **options)
        run()  # compiles or captures what this length needs
        place.synchronize()
        start = time.perf_counter()
        run()
        place.synchronize()
        seconds.append(time.perf_counter() - start)
    milliseconds = 1e3 * (seconds[1] - seconds[0]) / (2 * tokens)
    launches = [place.kernels(generation(model, ids, length, **options))[0] for length in (2, 4)]
    return {
        "ms a token": milliseconds,
        "tokens/s": 1e3 * len(ids) / milliseconds,
        "kernels a token": (launches[1] - launches[0]) / 2,
    }


def memory(place: Place) -> Iterator[Case]:
    """Measures the peak memory of training steps of 16,384 tokens, over the bytes of the parameters."""
    ways = {
        "MoE-256, AdamW": ({"num_experts": 256}, False, False),
        "MoE-256, AdamW, experts recomputed": ({"num_experts": 256, "recompute_experts": True}, False, False),
        "MoE-256, AdamW, full softmax in chunks": (
            {"num_experts": 256, "num_sampled": None, "loss_chunk_size": 2048},
            False,
            False,
        ),
        "MoE-256, FactoredAdam": ({"num_experts": 256}, True, False),
        "MoE-4096-h, FactoredAdam": ({"num_experts": 4096, "num_expert_groups": 16}, True, False),
        "MoE-4096-h, FactoredAdam, factored gradients": ({"num_experts": 4096, "num_expert_groups": 16}, True, True),
    }
    for name, way in place.size(ways, dict(list(ways.items())[-3:])).items():
        yield Case(name, lambda way=way: memory_of(place, *way))


def memory_of(place: Place, changes: dict, is_factored: bool, has_rows: bool) -> dict:
    model = language_model(place, **changes)
    model.set_experts_implementation("moe_hf")
    optimizer = FactoredAdam.for_model(model) if is_factored else None
    if has_rows:
        use_factored_gradients(model)
    step = training_step(place, model, "bfloat16 autocast", optimizer)
    with float32_precision("tf32"):
        step()
        peak, milliseconds = place.peak_gb(step), place.milliseconds(step, 5)
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    return {"parameters, GB": parameters, "peak GB": peak, "over parameters": peak / parameters, "ms": milliseconds}
