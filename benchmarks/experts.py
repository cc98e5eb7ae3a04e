#!/usr/bin/env python3
"""Time of the experts' forward and backward pass, as a multiple of a dense layer's with the same active FLOPs.

    python benchmarks/experts.py [--full] [--output benchmarks/results/experts.md]

All variants are timed in turn, round after round, and the medians compared: on a noisy machine only ratios hold.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import heading, save

from moe_hf import LstmMoeConfig, MoeExperts

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SHORT = [(256, 32, 4), (64, 32, 4), (8, 256, 4)]  # rows per expert, experts, experts per token
FULL = [*SHORT, (128, 32, 4), (32, 64, 4), (4, 256, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more sizes and rounds")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--moe_intermediate_size", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()

    facts = f"d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}"
    lines = [
        *heading("Experts: time over a dense layer of the same active FLOPs", facts),
        "| rows per expert | experts | k | " + " | ".join(f"{name} fwd / fwd+bwd" for name in IMPLEMENTATIONS) + " |",
        "|---" * (3 + len(IMPLEMENTATIONS)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for rows, num_experts, k in FULL if arguments.full else SHORT:
        cells = compare(rows, num_experts, k, arguments, rounds=9 if arguments.full else 3)
        lines.append(f"| {rows} | {num_experts} | {k} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    save(lines, arguments.output)


def compare(rows: int, num_experts: int, k: int, arguments, rounds: int) -> list[str]:
    """One cell for each implementation: forward and forward + backward, over dense."""
    width, hidden = arguments.hidden_size, arguments.moe_intermediate_size
    num_tokens = rows * num_experts // k
    config = LstmMoeConfig(hidden_size=width, num_experts=num_experts, moe_intermediate_size=hidden)
    experts = MoeExperts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    inputs = torch.randn(num_tokens, width, requires_grad=True)
    index = torch.rand(num_tokens, num_experts).topk(k).indices
    weights = torch.rand(num_tokens, k, requires_grad=True)
    up = torch.randn(k * hidden, width, requires_grad=True)
    down = torch.randn(width, k * hidden, requires_grad=True)

    def dense():
        return torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(inputs, up)), down)

    def sparse(name):
        def run():
            config._experts_implementation_internal = name
            return experts(inputs, index, weights)

        return run

    variants = {"dense": dense}
    # batched_mm copies the weights of both layers for every row: leave it out where that is more than 4 GB.
    gigabytes = num_tokens * k * 2 * width * hidden * 4 / 1e9
    variants |= {name: sparse(name) for name in IMPLEMENTATIONS if name != "batched_mm" or gigabytes < 4}
    forward = {name: [] for name in variants}
    both = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            for tensor in (inputs, weights, up, down, *experts.parameters()):
                tensor.grad = None
            start = time.perf_counter()
            output = run()
            middle = time.perf_counter()
            output.sum().backward()
            forward[name].append(middle - start)
            both[name].append(time.perf_counter() - start)

    def ratio(times, name):
        return statistics.median(times[name][1:]) / statistics.median(times["dense"][1:])

    return [
        f"{ratio(forward, name):.2f} / {ratio(both, name):.2f}" if name in variants else "needs too much memory"
        for name in IMPLEMENTATIONS
    ]


if __name__ == "__main__":
    main()
