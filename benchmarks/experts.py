#!/usr/bin/env python3
"""Time of the experts' forward and backward pass, as a multiple of a dense layer's with the same active FLOPs.

    python benchmarks/experts.py [--full] [--davidmrau FOLDER] [--output benchmarks/results/experts.md]
    python benchmarks/experts.py --full --device cuda --dtype bfloat16

FOLDER is a copy of github.com/davidmrau/mixture-of-experts. Its whole layer (gate, experts and balancing losses) is
compared with ours. Its experts end in a softmax over their outputs; our experts do not.

All variants are timed in turn, round after round, and the medians are compared: on a noisy machine only ratios hold.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from report import add_placement, heading, placement, save, seconds_now

from moe_hf import LstmMoeConfig, MoeBlock, MoeExperts
from moe_hf.models.balancing import balancing_loss

IMPLEMENTATIONS = ("moe_hf", "eager", "grouped_mm", "batched_mm")
SHORT = [(256, 32, 4), (64, 32, 4), (8, 256, 4)]  # rows per expert, experts, experts per token
FULL = [*SHORT, (128, 32, 4), (32, 64, 4), (4, 256, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more sizes and rounds")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--moe_intermediate_size", type=int, default=1024)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    add_placement(parser)
    parser.add_argument("--davidmrau", type=Path, help="folder with the moe.py of that repository")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = f"d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}"
    lines = [
        *heading("Experts: time over a dense layer of the same active FLOPs", facts, arguments),
        "| rows per expert | experts | k | " + " | ".join(f"{name} fwd / fwd+bwd" for name in IMPLEMENTATIONS) + " |",
        "|---" * (3 + len(IMPLEMENTATIONS)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for rows, num_experts, k in FULL if arguments.full else SHORT:
        cells = compare(rows, num_experts, k, arguments, rounds=9 if arguments.full else 3)
        lines.append(f"| {rows} | {num_experts} | {k} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    names = ["ours", *(["davidmrau"] if arguments.davidmrau else [])]
    lines += ["", "The whole layer while training:", ""]
    lines += ["| rows per expert | experts | k | " + " | ".join(f"{name} fwd / fwd+bwd" for name in names) + " |"]
    lines += ["|---" * (3 + len(names)) + "|"]
    print("\n".join(lines[-5:]), flush=True)
    for rows, num_experts, k in FULL if arguments.full else SHORT:
        cells = compare_layers(rows, num_experts, k, arguments, rounds=9 if arguments.full else 3)
        lines.append(f"| {rows} | {num_experts} | {k} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    save(lines, arguments.output)


def compare(rows: int, num_experts: int, k: int, arguments, rounds: int) -> list[str]:
    """Returns a table cell for each implementation: forward and forward + backward, over dense."""
    width, hidden = arguments.hidden_size, arguments.moe_intermediate_size
    num_tokens = rows * num_experts // k
    config = LstmMoeConfig(hidden_size=width, num_experts=num_experts, moe_intermediate_size=hidden)
    place = placement(arguments)
    experts = MoeExperts(config).to(**place)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    inputs = torch.randn(num_tokens, width, **place, requires_grad=True)
    index = torch.rand(num_tokens, num_experts, device=arguments.device).topk(k).indices
    weights = torch.rand(num_tokens, k, **place, requires_grad=True)

    def sparse(name):
        def run():
            config._experts_implementation_internal = name
            return experts(inputs, index, weights)

        return run

    # batched_mm copies the weights of both layers for every row: leave it out where the copies exceed 4 GB.
    gigabytes = num_tokens * k * 2 * width * hidden * inputs.element_size() / 1e9
    variants = {name: sparse(name) for name in IMPLEMENTATIONS if name != "batched_mm" or gigabytes < 4}
    ratios = over_dense(variants, inputs, k * hidden, [inputs, weights, *experts.parameters()], rounds)
    return [ratios.get(name, "needs too much memory") for name in IMPLEMENTATIONS]


def compare_layers(rows: int, num_experts: int, k: int, arguments, rounds: int) -> list[str]:
    """Returns a table cell for each layer, in the form of `compare`."""
    width, hidden = arguments.hidden_size, arguments.moe_intermediate_size
    sizes = {"num_experts": num_experts, "num_experts_per_tok": k, "moe_intermediate_size": hidden}
    config = LstmMoeConfig(hidden_size=width, dropout=0.0, **sizes)
    config._experts_implementation = "moe_hf"
    place = placement(arguments)
    block = MoeBlock(config).to(**place)
    inputs = torch.randn(rows * num_experts // k, width, **place, requires_grad=True)

    def ours():
        output, importance, load, _, _ = block(inputs[None])
        return output[0] + balancing_loss(importance, load, 0.1, 0.1)

    variants, parameters = {"ours": ours}, list(block.parameters())
    if arguments.davidmrau:
        sys.path.insert(0, str(arguments.davidmrau))
        from moe import MoE

        layer = MoE(width, width, num_experts, hidden, k=k).to(**place)
        variants["davidmrau"] = lambda: sum(layer(inputs))
        parameters += layer.parameters()
    return list(over_dense(variants, inputs, k * hidden, [inputs, *parameters], rounds).values())


def over_dense(
    variants: dict[str, Callable], inputs: torch.Tensor, hidden: int, leaves: list[torch.Tensor], rounds: int
) -> dict[str, str]:
    """Times forward and forward + backward of each variant, over a dense layer of `hidden` units."""
    place = {"device": inputs.device, "dtype": inputs.dtype, "requires_grad": True}
    up, down = torch.randn(hidden, inputs.shape[1], **place), torch.randn(inputs.shape[1], hidden, **place)

    def dense():
        return torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(inputs, up)), down)

    variants = {"dense": dense} | variants
    forward = {name: [] for name in variants}
    both = {name: [] for name in variants}
    gradient = torch.ones_like(inputs)
    for _ in range(rounds + 1):
        for name, run in variants.items():
            for tensor in (up, down, *leaves):
                tensor.grad = None
            start = seconds_now(inputs.device)
            output = run()
            middle = seconds_now(inputs.device)
            output.backward(gradient)
            forward[name].append(middle - start)
            both[name].append(seconds_now(inputs.device) - start)

    def ratio(times, name):
        return statistics.median(times[name][1:]) / statistics.median(times["dense"][1:])

    return {name: f"{ratio(forward, name):.2f} / {ratio(both, name):.2f}" for name in variants if name != "dense"}


if __name__ == "__main__":
    main()
