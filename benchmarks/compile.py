#!/usr/bin/env python3
"""What torch.compile gains: times of evaluation and training steps of both families, compiled over eager.

    python benchmarks/compile.py [--output benchmarks/results/compile.md]

Compiled and eager steps take turns, and the medians are compared: on a noisy machine only ratios hold.
The first compiled step includes the compilation; its time is shown separately and does not count.
"""

import argparse
import time
from pathlib import Path

import torch
from report import heading, median_seconds, save

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="rows of 32 tokens, one eighth padding (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps, after one warm-up step (default: 5)")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    facts = f"d = {arguments.hidden_size}, 16 experts, k = 2, {arguments.rows} rows of 32 tokens, V = 4,000"
    lines = [
        *heading("torch.compile", facts),
        "One graph each (`fullgraph=True`), by inductor.",
        "",
        "| model | step | compiled / plain | compiling takes |",
        "|---|---|---|---|",
    ]
    for family, build in (("LstmMoeForCausalLM", language_model), ("GnmtMoeForConditionalGeneration", translator)):
        model, inputs = build(arguments)
        for mode in ("evaluation", "training"):
            model.train(mode == "training")
            torch.compiler.reset()
            steps = {"plain": step(model, inputs), "compiled": step(torch.compile(model, fullgraph=True), inputs)}
            start = time.perf_counter()
            steps["compiled"]()
            compiling = time.perf_counter() - start
            times = median_seconds(steps, arguments.rounds)
            lines.append(f"| {family} | {mode} | {times['compiled'] / times['plain']:.2f} | {compiling:.0f} s |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    save(lines, arguments.output)


def sizes(arguments) -> dict:
    hidden = arguments.hidden_size
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * hidden}
    return {"vocab_size": 4000, "hidden_size": hidden, **experts, **special}


def batch(arguments) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, 4000, (arguments.rows, 32)), torch.ones(arguments.rows, 32, dtype=torch.long)
    mask[:, 28:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def language_model(arguments) -> tuple:
    inputs = batch(arguments)
    return LstmMoeForCausalLM(LstmMoeConfig(**sizes(arguments))), inputs | {"labels": inputs["input_ids"]}


def translator(arguments) -> tuple:
    config = GnmtMoeConfig(**sizes(arguments), decoder_start_token_id=1, attention_feeding="parallel")
    return GnmtMoeForConditionalGeneration(config), batch(arguments) | {
        "labels": torch.randint(3, 4000, (arguments.rows, 16))
    }


def step(model, inputs):
    def run() -> None:
        with torch.set_grad_enabled(model.training):
            loss = model(**inputs).loss
        if model.training:
            loss.backward()
            model.zero_grad()

    return run


if __name__ == "__main__":
    main()
