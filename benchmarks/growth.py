#!/usr/bin/env python3
"""How the cost of a training step grows with the number of experts, at a fixed number of tokens.

    python benchmarks/growth.py [--davidmrau FOLDER] [--lucidrains FOLDER] [--output benchmarks/results/growth.md]

There are two tables. The first times the gates alone at the paper's widths. The second times the whole step of
`MoeExperts` with given routing: forward, backward, exact clipping and optimizer. Times are multiples of a dense layer
with as many operations as the active experts. Each step runs in a separate process, so that peak memory is not
shared, in turn with the dense layer. A plot is written beside --output.

The folders are copies of github.com/davidmrau/mixture-of-experts and github.com/lucidrains/mixture-of-experts. Their
layers contain gates, whose time counts. The second layer has two experts per token, not four. AdamW updates both.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from report import heading, median_seconds, save

from moe_hf import (
    FactoredAdam,
    HierarchicalGate,
    LstmMoeConfig,
    MoeExperts,
    NoisyTopKGate,
    clip_grad_norm_,
    use_factored_gradients,
)
from moe_hf.models.balancing import balancing_loss
from moe_hf.models.native_experts import library

K, WIDTH = 4, 256
GATES = [(32, None), (256, None), (1024, None), (1024, 16), (4096, None), (4096, 16), (4096, 64)]  # experts, groups
# Experts and their hidden size. Gradients of all experts do not fit into memory at the last one.
SIZES = [(256, 128), (1024, 128), (4096, 128), (16384, 32), (65536, 32)]
KERNELS, PLAIN = "factored gradients, kernels", "factored gradients, plain torch"
STEPS = (
    KERNELS,
    PLAIN,
    "dense gradients, FactoredAdam",
    "dense gradients, AdamW",
    "grouped_mm of Transformers, AdamW",
)
PEERS = ("davidmrau", "lucidrains")
MOST_PEER_EXPERTS = 4096
MOST_DENSE_PARAMETERS = 600_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step (default: 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one warm-up round (default: 5)")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"only these of {[n for n, _ in SIZES]} experts")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help="folder with a copy of that repository")
    parser.add_argument("--no_gates", action="store_true", help="leave out the gates")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to; the plot gets its name")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # the step that a subprocess measures
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure_step(arguments)))
        return
    facts = f"{arguments.tokens} tokens, k = {K}"
    lines = [*heading("Growth with the number of experts", facts)]
    if not arguments.no_gates:
        lines += [*gate_table(arguments.tokens, arguments.rounds), ""]
        print("\n".join(lines), flush=True)
    step_lines, times = step_table(arguments)
    print("\n".join(step_lines))
    if arguments.output:
        picture = arguments.output.with_suffix(".png")
        save([*lines, *step_lines, "", f"![time of a step]({picture.name})"], arguments.output)
        plot(times, picture)


def gate_table(num_tokens: int, rounds: int, width: int = 512, hidden: int = 1024) -> list[str]:
    """Times the forward and backward pass of each gate, over the dense layer's."""
    inputs = torch.randn(num_tokens, width, requires_grad=True)
    variants = {"dense": dense_layer(inputs, K * hidden)}
    variants |= {(n, groups): gate_step(build_gate(width, n, groups), inputs) for n, groups in GATES}
    seconds = median_seconds(variants, rounds)
    lines = [f"Gate at d = {width}, forward and backward, over a dense layer of {K} x {hidden} hidden units:", ""]
    lines += ["| experts | groups | gate / dense |", "|---|---|---|"]
    for n, groups in GATES:
        lines.append(f"| {n} | {groups or 'flat'} | {seconds[n, groups] / seconds['dense']:.2f} |")
    return lines


def build_gate(width: int, num_experts: int, groups: int | None) -> torch.nn.Module:
    gate = NoisyTopKGate(width, num_experts, K) if groups is None else HierarchicalGate(width, num_experts, K, groups)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return gate


def gate_step(gate: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    def run():
        routed = gate(inputs)
        (routed.top_k_weights.square().sum() + balancing_loss(routed.importance, routed.load, 0.1, 0.1)).backward()
        forget([inputs, *gate.parameters()])

    return run


def dense_layer(inputs: torch.Tensor, hidden: int) -> Callable[[], None]:
    """Returns the forward and backward pass of a dense layer with as many hidden units as a token's experts in sum."""
    up = torch.randn(hidden, inputs.shape[1], requires_grad=True)
    down = torch.randn(inputs.shape[1], hidden, requires_grad=True)

    def run():
        output = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(inputs, up)), down)
        output.sum().backward()
        forget([inputs, up, down])

    return run


def forget(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def step_table(arguments) -> tuple[list[str], dict]:
    """Returns the table's lines, and the times over the dense layer's, by name of the step and number of experts."""
    names = [*STEPS, *(peer for peer in PEERS if getattr(arguments, peer))]
    lines = [
        f"Whole steps at d = {WIDTH}, over the forward and backward pass of that dense layer. The bound by bytes: the",
        "used experts' weights are read twice and written once, at the bandwidth of a copy.",
        "",
        "| experts | h | step | ms | over dense | over the bound | peak memory / parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    times = {name: {} for name in names}
    for n, hidden in SIZES:
        num_parameters = 2 * n * hidden * WIDTH
        for name in names if not arguments.sizes or n in arguments.sizes else ():
            if is_left_out(name, n, num_parameters):
                continue
            found = in_a_process(name, n, hidden, arguments)
            times[name][n] = found["step"] / found["dense"]
            figures = f"{1000 * found['step']:.0f} | {times[name][n]:.1f} | {found['step'] / found['bound']:.1f}"
            lines.append(f"| {n:,} | {hidden} | {name} | {figures} | {found['bytes'] / (4 * num_parameters):.2f} |")
            print(lines[-1], flush=True)
    return lines, times


def is_left_out(name: str, num_experts: int, num_parameters: int) -> bool:
    if name == KERNELS:
        return library() is None
    if name in PEERS:
        return num_experts > MOST_PEER_EXPERTS
    return name != PLAIN and num_parameters > MOST_DENSE_PARAMETERS


def in_a_process(name: str, num_experts: int, hidden: int, arguments) -> dict:
    command = [sys.executable, __file__, "--step", name, str(num_experts), str(hidden)]
    command += ["--tokens", str(arguments.tokens), "--rounds", str(arguments.rounds)]
    environment = dict(os.environ, MOE_HF_NATIVE="0") if name == PLAIN else None
    if name in PEERS:
        command += [f"--{name}", str(getattr(arguments, name))]
    return json.loads(subprocess.check_output(command, text=True, env=environment).splitlines()[-1])


def measure_step(arguments) -> dict:
    """Returns the seconds of the step, of the dense layer and of the bound, and the step's peak bytes.

    Peak bytes do not count what the process held before the step.
    """
    name, num_experts, hidden = arguments.step[0], int(arguments.step[1]), int(arguments.step[2])
    inputs = torch.randn(arguments.tokens, WIDTH, requires_grad=True)
    variants = {"dense": dense_layer(inputs, K * hidden), "copy": copy_of(2**26)}
    for run in variants.values():
        run()
    before = peak_bytes()
    index = torch.randint(num_experts, (arguments.tokens, K))
    if name in PEERS:
        layer = peer_layer(name, getattr(arguments, name), num_experts, hidden)
        forward = partial(layer, inputs if name == "davidmrau" else inputs[None])
    else:
        layer = own_layer(name, num_experts, hidden)
        forward = partial(layer, inputs, index, torch.rand(arguments.tokens, K).softmax(-1).requires_grad_())
    if name.endswith("AdamW") or name in PEERS:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, fused=True)
    else:
        optimizer = FactoredAdam.for_model(layer, lr=1e-5)
    if name in (KERNELS, PLAIN):
        use_factored_gradients(layer)

    def step():
        output = forward()
        (sum(part.sum() for part in output) if isinstance(output, tuple) else output.sum()).backward()
        clip_grad_norm_(layer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        forget([inputs, *forward.args])

    seconds = median_seconds(variants | {"step": step}, arguments.rounds)
    used_bytes = 4 * 2 * WIDTH * hidden * len(index.unique())
    bandwidth = 2 * 4 * 2**26 / seconds["copy"]
    return {
        "step": seconds["step"],
        "dense": seconds["dense"],
        "bound": 3 * used_bytes / bandwidth,
        "bytes": peak_bytes() - before,
    }


def own_layer(name: str, num_experts: int, hidden: int) -> MoeExperts:
    config = LstmMoeConfig(hidden_size=WIDTH, num_experts=num_experts, moe_intermediate_size=hidden)
    config._experts_implementation = "grouped_mm" if name.startswith("grouped_mm") else "moe_hf"
    return MoeExperts(config)


def peer_layer(name: str, folder: Path, num_experts: int, hidden: int) -> torch.nn.Module:
    sys.path.insert(0, str(folder))
    if name == "davidmrau":
        from moe import MoE

        return MoE(WIDTH, WIDTH, num_experts, hidden, k=K)
    from mixture_of_experts import MoE

    return MoE(WIDTH, num_experts, hidden)


def copy_of(num_values: int) -> Callable[[], None]:
    source, target = torch.randn(num_values), torch.randn(num_values)
    return lambda: target.copy_(source)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plot(times: dict[str, dict[int, float]], file: Path) -> None:
    """Plots the steps' times, over the dense layer's, against the number of experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, by_size in times.items():
        axes.plot(list(by_size), list(by_size.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("experts (hidden size 128, from 16,384 on 32)")
    axes.set_ylabel("time of a step over the dense layer's")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
