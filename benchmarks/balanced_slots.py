#!/usr/bin/env python3
"""Strictly balanced gating: how to hand the experts a batch whose tokens have different numbers of experts.

    python benchmarks/balanced_slots.py [--full] [--output benchmarks/results/balanced-slots.md]

"padded": each token gets as many slots as the token with the most experts; unused slots have weight 0. "segments":
each used slot becomes a token with one slot, and the outputs are summed by token (what `MoeBlock` does). Times cover
the forward and backward pass, as a multiple of gating with exactly k experts for each token, which uses the same
number of slots. All variants are timed in turn, round after round, and the medians are compared: on a noisy machine
only ratios hold.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import heading, save

from moe_hf import LstmMoeConfig, MoeBlock

IMPLEMENTATIONS = ("eager", "grouped_mm")
SHORT = [(2048, 32, 512, 1024), (2048, 512, 128, 256)]  # tokens, experts, width, expert hidden size
FULL = [*SHORT, (8192, 32, 512, 1024), (8192, 512, 128, 256)]
SPREADS = (0.1, 3.0)  # standard deviation of the logits: a new gate, a sharp one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num_experts_per_tok", type=int, default=4)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()

    facts = f"k = {arguments.num_experts_per_tok}"
    lines = [
        *heading("Strictly balanced gating: slots padded to the batch's maximum, or segments", facts),
        "Forward and backward of the experts, over gating with exactly k experts for each token.",
        "",
        "| tokens | experts | d | h | std of the logits | experts of a token, most | "
        + " | ".join(f"{name} padded / segments" for name in IMPLEMENTATIONS)
        + " |",
        "|---" * (6 + len(IMPLEMENTATIONS)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for sizes in FULL if arguments.full else SHORT:
        for spread in SPREADS:
            most, cells = compare(*sizes, spread, arguments)
            lines.append(f"| {' | '.join(map(str, sizes))} | {spread} | {most} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    save(lines, arguments.output)


def compare(num_tokens: int, num_experts: int, width: int, hidden: int, spread: float, arguments):
    """Returns the largest number of experts of a token, and one table cell for each implementation."""
    torch.manual_seed(0)
    config = LstmMoeConfig(
        hidden_size=width,
        num_experts=num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok,
        moe_intermediate_size=hidden,
        gating="strictly_balanced",
    )
    block = MoeBlock(config)
    torch.nn.init.normal_(block.gate.weight, std=spread * width**-0.5)
    inputs = torch.randn(num_tokens, width, requires_grad=True)
    with torch.no_grad():
        routed = block.gate(inputs)
        fixed = routed.router_logits.topk(arguments.num_experts_per_tok, dim=-1)
    fixed_weights = fixed.values.softmax(dim=-1)

    forms = {
        "fixed k": lambda: block.experts(inputs, fixed.indices, fixed_weights),
        "padded": lambda: block.experts(inputs, routed.top_k_index, routed.top_k_weights),
        "segments": lambda: block.mix_experts(inputs, routed),
    }
    times = {(name, form): [] for name in IMPLEMENTATIONS for form in forms}
    for _ in range(arguments.rounds + 1):
        for (name, form), measured in times.items():
            config._experts_implementation_internal = name
            block.zero_grad()
            inputs.grad = None
            start = time.perf_counter()
            forms[form]().sum().backward()
            measured.append(time.perf_counter() - start)
    seconds = {variant: statistics.median(measured[1:]) for variant, measured in times.items()}
    cells = [
        " / ".join(f"{seconds[name, form] / seconds[name, 'fixed k']:.2f}" for form in ("padded", "segments"))
        for name in IMPLEMENTATIONS
    ]
    return int((routed.top_k_weights > 0).sum(dim=-1).max()), cells


if __name__ == "__main__":
    main()
