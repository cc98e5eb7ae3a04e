#!/usr/bin/env python3
"""Milliseconds of one decoding step: eager, compiled, and in bfloat16, over the step's matrix products alone.

    python benchmarks/decoding.py [--output benchmarks/results/decoding.md]

A step is the forward pass of one token for each row, given the state before it, without the work of generate() around
it. The variants take turns of 20 steps, and the medians are compared: on a noisy machine only ratios hold. `logits` is
the largest difference between the logits of the compiled step and of the eager step, in float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from report import heading, median_seconds, save
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM

VOCAB_SIZE, STEPS_A_TURN = 8000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--families", nargs="+", choices=("lm", "gnmt"), default=["lm", "gnmt"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15, help="timed turns, after one warm-up turn (default: 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.device, arguments.dtype = torch.device("cpu"), " and ".join(arguments.dtypes)
    lines = [
        *heading("Decoding: milliseconds of a step", f"32 experts of 2 d, k = 4, V = {VOCAB_SIZE:,}", arguments),
        "| model | d | rows | dtype | products | as it is | compiled | as it is / compiled | logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for family in arguments.families:
        for width in arguments.widths:
            for batch in arguments.batches:
                for row in rows_of_table(family, width, batch, arguments):
                    lines.append(row)
                    print(row, flush=True)
    save(lines, arguments.output)


@torch.no_grad()
def rows_of_table(family: str, width: int, batch: int, arguments) -> list[str]:
    """Returns a table row for each dtype, timed in turn."""
    variants, differences = {}, {}
    model = build(family, width)
    reference = decoding_step(model, model, DynamicCache, batch)().logits
    for dtype in arguments.dtypes:
        model = build(family, width).to(getattr(torch, dtype))
        steps = {
            "as it is": decoding_step(model, model, DynamicCache, batch),
            "compiled": decoding_step(model, model.get_compiled_call(CompileConfig()), StaticCache, batch),
        }
        differences[dtype] = (steps["compiled"]().logits.float() - reference).abs().max().item()
        steps["products"] = products(model, batch)
        variants |= {(dtype, name): turn(step) for name, step in steps.items()}
    medians = median_seconds(variants, arguments.rounds)
    times = {key: 1000 * seconds / STEPS_A_TURN for key, seconds in medians.items()}
    rows = []
    for dtype in arguments.dtypes:
        of_products, plain, compiled = (times[dtype, name] for name in ("products", "as it is", "compiled"))
        cells = f"{of_products:.2f} | {plain:.2f} | {compiled:.2f} | {plain / compiled:.2f} | {differences[dtype]:.0e}"
        rows.append(f"| {family} | {width} | {batch} | {dtype} | {cells} |")
    return rows


def turn(step: Callable) -> Callable:
    """Several steps in a row: as in generate(), weights that fit into the processor's cache stay there."""

    def run() -> None:
        for _ in range(STEPS_A_TURN):
            step()

    return run


def build(family: str, width: int) -> PreTrainedModel:
    experts = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 2 * width}
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": width, **experts}
    torch.manual_seed(0)
    if family == "lm":
        model = LstmMoeForCausalLM(LstmMoeConfig(layer_pattern=["lstm", "moe", "lstm"], **sizes))
    else:
        model = GnmtMoeForConditionalGeneration(GnmtMoeConfig(decoder_start_token_id=1, **sizes))
    for name, parameter in model.named_parameters():
        if ".gate." in name:  # zero at the start of training, so that all tokens would have the same experts
            torch.nn.init.normal_(parameter, std=width**-0.5)
    return model.eval()


def decoding_step(model: PreTrainedModel, forward: Callable, kind: type, batch: int) -> Callable:
    """Returns a function that decodes one more token at each call, after a prompt of 8 tokens or a source of 20."""
    length = {"max_cache_len": 64} if kind is StaticCache else {}
    caches = [kind(config=model.config, **length) for _ in range(1 + model.config.is_encoder_decoder)]
    cache = EncoderDecoderCache(*caches) if model.config.is_encoder_decoder else caches[0]
    inputs, ids_name = {"past_key_values": cache, "use_cache": True, "return_dict": True}, "input_ids"
    prompt = torch.randint(3, VOCAB_SIZE, (batch, 8), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder:
        source = torch.randint(3, VOCAB_SIZE, (batch, 20), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(source)
        inputs |= {"encoder_outputs": model.get_encoder()(input_ids=source, attention_mask=mask)}
        inputs |= {"attention_mask": mask}
        ids_name = "decoder_input_ids"
    model(**inputs, **{ids_name: prompt})
    inputs[ids_name] = prompt[:, :1].clone()
    return lambda: forward(**inputs)


def products(model: PreTrainedModel, batch: int) -> Callable:
    """Returns the matrix products of a step alone: every matrix that a step reads, k experts a row, same dtype."""
    decoder = model.get_decoder()
    layers = [layer for layer in decoder.layers if hasattr(layer, "weight_ih")]
    weights = [weight for layer in layers for weight in (layer.weight_ih, layer.weight_hh)]
    attentions = [layer.attention for layer in layers if hasattr(layer, "attention")]
    blocks = [layer for layer in decoder.layers if hasattr(layer, "experts")]
    weights += [model.lm_head.weight, *(a.query_weight for a in attentions), *(block.gate.weight for block in blocks)]
    pairs = [(torch.randn(batch, weight.shape[1], dtype=weight.dtype), weight.t()) for weight in weights]
    for block in blocks:
        for slot in range(batch * model.config.num_experts_per_tok):
            for weight in (block.experts.up_proj[slot], block.experts.down_proj[slot]):
                pairs.append((torch.randn(1, weight.shape[1], dtype=weight.dtype), weight.t()))

    def run() -> None:
        for x, weight in pairs:
            torch.mm(x, weight)

    return run


if __name__ == "__main__":
    main()
