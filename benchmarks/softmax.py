#!/usr/bin/env python3
"""Time and memory of a training step with the full, the chunked and the sampled softmax over a large vocabulary.

    python benchmarks/softmax.py [--vocab_size 131072] [--layer_pattern lstm moe lstm] [--output FILE.md]

A step is the forward pass, backward pass and Adam update of a whole language model, on words drawn by Zipf's law. All
variants are timed in turn, round after round, and the medians are compared: on a noisy machine only ratios hold. Times
are CPU time of all threads of the process, which other jobs disturb less than wall time. Memory is the process's
resident peak in a step above its resident memory before the step (Linux only).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from report import heading, save

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

PARTS = ("forward", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=131072)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--num_sampled", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--loss_chunk_size", type=int, default=256)
    parser.add_argument("--layer_pattern", nargs="+", default=["lstm"])
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--tie_word_embeddings", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = LstmMoeForCausalLM(
        LstmMoeConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            layer_pattern=arguments.layer_pattern,
            num_experts=arguments.num_experts,
            tie_word_embeddings=arguments.tie_word_embeddings,
        )
    ).train()
    times, memory = measure(model, arguments)
    facts = (
        f"V = {arguments.vocab_size:,}, d = {arguments.hidden_size}, {arguments.tokens:,} tokens a step, layers "
        f"{' '.join(arguments.layer_pattern)}, {model.num_parameters() / 1e6:.0f} M parameters"
    )
    lines = [
        *heading("Softmax: a training step over a large vocabulary", facts),
        f"CPU seconds, medians of {arguments.rounds} rounds; memory above weights and optimizer state.",
        "",
        "| softmax | step | full / this | " + " | ".join(PARTS) + " | peak memory |",
        "|---" * (4 + len(PARTS)) + "|",
    ]
    full = statistics.median(map(sum, times["full"]))
    for name, rounds in times.items():
        step = statistics.median(map(sum, rounds))
        parts = [f"{statistics.median(column):.2f}" for column in zip(*rounds)]
        peak = f"{max(memory[name]) / 1e9:.2f} GB" if memory[name] else "not measured"
        lines.append(f"| {name} | {step:.2f} | {full / step:.1f} | " + " | ".join([*parts, peak]) + " |")
    print("\n".join(lines))
    save(lines, arguments.output)


def measure(model, arguments) -> tuple[dict[str, list[tuple]], dict[str, list[int]]]:
    """Returns, for each variant, the seconds of each part of each round's step, and bytes.

    A first round does not count.
    """
    variants = {
        "full": (None, None),
        f"chunked, {arguments.loss_chunk_size} tokens": (None, arguments.loss_chunk_size),
    }
    variants |= {f"sampled, {number}": (number, None) for number in arguments.num_sampled}
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    times, memory = {name: [] for name in variants}, {name: [] for name in variants}
    for number in range(arguments.rounds + 1):
        for name, (model.config.num_sampled, model.config.loss_chunk_size) in variants.items():
            words = torch.rand(arguments.tokens // 32, 32).mul(torch.log(torch.tensor(float(arguments.vocab_size))))
            input_ids = words.exp().long() - 1  # log-uniform
            before = reset_peak()
            marks = [time.process_time()]
            loss = model(input_ids.clamp(min=0), labels=input_ids.clamp(min=0)).loss
            marks.append(time.process_time())
            loss.backward()
            marks.append(time.process_time())
            optimizer.step()
            optimizer.zero_grad()
            marks.append(time.process_time())
            del loss
            print(f"round {number}, {name}: {marks[-1] - marks[0]:.2f} s", file=sys.stderr, flush=True)
            if number:
                times[name].append(tuple(end - start for start, end in zip(marks, marks[1:])))
                memory[name] += [] if before is None else [peak() - before]
    return times, memory


def reset_peak() -> int | None:
    """Resets the recorded resident peak, and returns the bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
