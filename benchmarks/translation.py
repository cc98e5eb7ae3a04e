#!/usr/bin/env python3
"""Sentences per second of beam search, against a MarianMT with as many active parameters.

    python benchmarks/translation.py [--output benchmarks/results/translation.md]

Both models have random weights, and every translation is forced to the same length. The models take turns and the
medians are compared: on a noisy machine only ratios hold.
"""

import argparse
from pathlib import Path

import torch
from generation import active_parameters
from report import add_placement, heading, median_seconds, placement, save
from transformers import MarianConfig, MarianMTModel

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration

TOKENS = {"vocab_size": 32000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=20, help="tokens of source and translation (default: 20)")
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up round (default: 3)")
    add_placement(parser)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    models = {"GNMT-MoE": gnmt_moe(), "GNMT-MoE, deep output": gnmt_moe(deep_output=True), "MarianMT": marian()}
    models = {name: model.to(**placement(arguments)) for name, model in models.items()}
    active = ", ".join(f"{name} {active_parameters(model) / 1e6:.2f} M" for name, model in models.items())
    facts = (
        f"n = 32, beam {arguments.num_beams}, {arguments.length} tokens in and out; active parameters without "
        f"embedding and softmax: {active}"
    )
    lines = [
        *heading("Translation: sentences per second", facts, arguments),
        f"| batch | {' | '.join(models)} | ratio | ratio, deep output |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for batch in arguments.batches:
        source = torch.randint(3, TOKENS["vocab_size"], (batch, arguments.length), device=arguments.device)
        options = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.length, "do_sample": False}
        options |= {"min_new_tokens": arguments.length, "attention_mask": torch.ones_like(source)}
        variants = {name: lambda model=model: model.generate(source, **options) for name, model in models.items()}
        times = median_seconds(variants, arguments.rounds, arguments.device)
        cells = " | ".join(f"{batch / seconds:.2f}" for seconds in times.values())
        ratios = [times["MarianMT"] / times[name] for name in models if name != "MarianMT"]
        lines.append(f"| {batch} | {cells} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
        print(lines[-1], flush=True)
    save(lines, arguments.output)


def gnmt_moe(deep_output: bool = False) -> GnmtMoeForConditionalGeneration:
    config = GnmtMoeConfig(
        hidden_size=512, moe_intermediate_size=1024, tie_word_embeddings=True, deep_output=deep_output, **TOKENS
    )
    return GnmtMoeForConditionalGeneration(config).eval()


def marian() -> MarianMTModel:
    sizes = {"d_model": 512, "encoder_layers": 4, "decoder_layers": 3}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_ffn_dim": 2048, f"{part}_attention_heads": 8}
    return MarianMTModel(MarianConfig(**sizes, forced_eos_token_id=None, **TOKENS)).eval()


if __name__ == "__main__":
    main()
