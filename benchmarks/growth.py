#!/usr/bin/env python3
"""How the cost of a training step grows with the number of experts, at a fixed number of tokens.

    python benchmarks/growth.py [--output benchmarks/results/growth.md]

Two tables: the gates alone at the paper's widths, over a dense layer of the active experts' FLOPs; and gate, experts
and optimizer of a whole layer, of narrower experts so that the largest fits into memory. A plot goes beside --output.
All variants are timed in turn, round after round, and the medians compared: on a noisy machine only ratios hold.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import heading, save

from moe_hf import HierarchicalGate, LstmMoeConfig, MoeExperts, NoisyTopKGate
from moe_hf.models.balancing import balancing_loss
from moe_hf.training.optimizer import FactoredAdam

K = 4
GATES = [(32, None), (256, None), (1024, None), (1024, 16), (4096, None), (4096, 16), (4096, 64)]  # experts, groups
LAYERS = [(32, None), (256, None), (1024, 32), (4096, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step (default: 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not (default: 5)")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to; the plot gets its name")
    arguments = parser.parse_args()
    facts = f"{arguments.tokens} tokens, k = {K}"
    lines = [
        *heading("Growth with the number of experts", facts),
        *gate_table(arguments.tokens, arguments.rounds),
        "",
    ]
    print("\n".join(lines), flush=True)
    layer_lines, parts = layer_table(arguments.tokens, arguments.rounds)
    print("\n".join(layer_lines))
    if arguments.output:
        picture = arguments.output.with_suffix(".png")
        save([*lines, *layer_lines, "", f"![time of a step]({picture.name})"], arguments.output)
        plot(parts, picture)


def gate_table(num_tokens: int, rounds: int, width: int = 512, hidden: int = 1024) -> list[str]:
    """Forward and backward pass of each gate, over that of the dense layer."""
    inputs = torch.randn(num_tokens, width, requires_grad=True)
    variants = {"dense": timed_dense(inputs, K * hidden)}
    variants |= {(n, groups): timed_gate(build_gate(width, n, groups), inputs) for n, groups in GATES}
    seconds = median_times(variants, rounds)
    lines = [f"Gate at d = {width}, forward and backward, over a dense layer of {K} x {hidden} hidden units:", ""]
    lines += ["| experts | groups | gate / dense |", "|---|---|---|"]
    for n, groups in GATES:
        lines.append(f"| {n} | {groups or 'flat'} | {seconds[n, groups] / seconds['dense']:.2f} |")
    return lines


def layer_table(num_tokens: int, rounds: int, width: int = 256, hidden: int = 128) -> tuple[list[str], dict]:
    """Milliseconds of each part of a step; one number of experts after the other, since all would not fit."""
    inputs = torch.randn(num_tokens, width, requires_grad=True)
    names = ["gate", "experts", "fused AdamW", "FactoredAdam"]
    lines = [f"A layer at d = {width}, h = {hidden}; milliseconds and multiples of the dense layer of {K} x {hidden}:"]
    lines += [
        "",
        "| experts | groups | parameters | dense | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    parts = {}
    for n, groups in LAYERS:
        gate = build_gate(width, n, groups)
        config = LstmMoeConfig(hidden_size=width, num_experts=n, moe_intermediate_size=hidden)
        config._experts_implementation = "eager"
        experts = MoeExperts(config)
        weights = list(experts.parameters())
        optimizers = {
            "fused AdamW": torch.optim.AdamW(weights, lr=1e-3, fused=True),
            "FactoredAdam": FactoredAdam([{"params": weights, "factored": True}], lr=1e-3),
        }
        variants = {"dense": timed_dense(inputs, K * hidden), "gate": timed_gate(gate, inputs)}
        variants["experts"] = timed_experts(experts, gate, inputs)
        variants |= {name: timed_optimizer(optimizer, weights) for name, optimizer in optimizers.items()}
        seconds = median_times(variants, rounds)
        dense = seconds["dense"]
        cells = [f"{1000 * seconds[name]:.1f} ({seconds[name] / dense:.2f})" for name in names]
        size = f"{sum(weight.numel() for weight in weights) / 1e6:.1f} M"
        lines.append(f"| {n} | {groups or 'flat'} | {size} | {1000 * dense:.1f} | " + " | ".join(cells) + " |")
        parts[n] = {name: seconds[name] for name in ["dense", *names]}
    return lines, parts


def build_gate(width: int, num_experts: int, groups: int | None) -> torch.nn.Module:
    gate = NoisyTopKGate(width, num_experts, K) if groups is None else HierarchicalGate(width, num_experts, K, groups)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return gate


def timed_dense(inputs: torch.Tensor, hidden: int) -> Callable[[], float]:
    up = torch.randn(hidden, inputs.shape[1], requires_grad=True)
    down = torch.randn(inputs.shape[1], hidden, requires_grad=True)

    def run():
        output = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(inputs, up)), down)
        output.sum().backward()

    return timed(run, [inputs, up, down])


def timed_gate(gate: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], float]:
    def run():
        routed = gate(inputs)
        (routed.top_k_weights.square().sum() + balancing_loss(routed.importance, routed.load, 0.1, 0.1)).backward()

    return timed(run, [inputs, *gate.parameters()])


def timed_experts(experts: MoeExperts, gate: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], float]:
    with torch.no_grad():
        routed = gate(inputs)

    def run():
        experts(inputs, routed.top_k_index, routed.top_k_weights).sum().backward()

    return timed(run, [inputs, *experts.parameters()])


def timed_optimizer(optimizer: torch.optim.Optimizer, weights: list[torch.Tensor]) -> Callable[[], float]:
    def run():
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        start = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - start
        for weight in weights:
            weight.grad = None
        return seconds

    return run


def timed(run: Callable[[], None], tensors: list[torch.Tensor]) -> Callable[[], float]:
    """`run` with fresh gradients, returning its seconds."""

    def measure():
        for tensor in tensors:
            tensor.grad = None
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        for tensor in tensors:
            tensor.grad = None
        return seconds

    return measure


def median_times(variants: dict, rounds: int) -> dict:
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            times[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def plot(parts: dict[int, dict[str, float]], file: Path) -> None:
    """The parts' times over the dense layer's, against the number of experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(parts.values())):
        axes.plot(list(parts), [part[name] / part["dense"] for part in parts.values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("experts")
    axes.set_ylabel("time over the dense layer's")
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
