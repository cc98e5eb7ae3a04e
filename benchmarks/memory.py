#!/usr/bin/env python3
"""Peak memory and time of a training step with and without recomputed experts, and with each optimizer (appendix D).

    python benchmarks/memory.py [--output benchmarks/results/memory.md]

The model is a stack of MoE blocks in float32, each with its own tokens' hidden states. torch's MemTracker counts the
bytes of every live tensor, without a kernel's internal allocations, so the bytes are the same on every run. The
variants are timed in turn, round after round, in one thread's processor time; the medians are shown.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import heading, save
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from moe_hf import LstmMoeConfig, MoeBlock
from moe_hf.training.optimizer import FactoredAdam, state_bytes

OPTIMIZERS = {
    "adamw_torch_fused": lambda params: torch.optim.AdamW(params, fused=True),
    "factored_adam": lambda params: FactoredAdam(params, factored=True),
}
VARIANTS = [(name, recompute) for name in OPTIMIZERS for recompute in (False, True)]
MB = 1e6


class Stack(nn.Module):
    def __init__(self, config, num_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(MoeBlock(config) for _ in range(num_layers))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)[0]
        return hidden_states


class Step:
    """A model with its optimizer, which also updates the gates' parameters: they are few, and they are matrices."""

    def __init__(self, name: str, recompute: bool, arguments):
        config = LstmMoeConfig(
            hidden_size=arguments.hidden_size,
            num_experts=arguments.num_experts,
            num_experts_per_tok=arguments.num_experts_per_tok,
            moe_intermediate_size=arguments.moe_intermediate_size,
            recompute_experts=recompute,
        )
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        self.model = Stack(config, arguments.num_layers)
        for block in self.model.blocks:
            nn.init.normal_(block.gate.weight, std=0.1)  # at zero all tokens choose the same experts
            nn.init.normal_(block.gate.noise_weight, std=0.1)
        self.params = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[name](self.params)
        self.hidden_states = torch.randn(1, arguments.num_tokens, arguments.hidden_size)

    def loss(self) -> torch.Tensor:
        return self.model(self.hidden_states).square().mean()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def times(self) -> tuple[float, float]:
        """Returns the seconds of both passes, and of the optimizer's step."""
        start = time.thread_time()
        self.loss().backward()
        middle = time.thread_time()
        self.update()
        return middle - start, time.thread_time() - middle

    def memory(self) -> tuple[int, int, int]:
        """Returns bytes: left by the forward pass, at the peak of both passes, at the peak of the optimizer's step."""
        for param in self.params:  # the optimizer creates its state in its first step
            param.grad = torch.zeros_like(param)
        self.update()
        tracker = self.tracker()
        with tracker:
            before = total(tracker, "current")
            loss = self.loss()
            kept = total(tracker, "current") - before
            loss.backward()
        passes = total(tracker, "peak")
        tracker = self.tracker()
        with tracker:
            self.update()
        return kept, passes, total(tracker, "peak")

    def tracker(self) -> MemTracker:
        tracker = MemTracker()
        tracker.track_external(self.model, self.optimizer, self.hidden_states)
        return tracker


def total(tracker: MemTracker, which: str) -> int:
    (snapshot,) = tracker.get_tracker_snapshot(which).values()
    return snapshot["Total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--moe_intermediate_size", type=int, default=1024)
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--num_experts_per_tok", type=int, default=4)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = (
        f"{arguments.num_layers} MoE blocks, d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}, "
        f"n = {arguments.num_experts}, k = {arguments.num_experts_per_tok}, {arguments.num_tokens} tokens"
    )
    lines = heading("Peak memory and time of a training step", facts)
    steps = [Step(*variant, arguments) for variant in VARIANTS]
    own = sum(param.nbytes for param in steps[0].params)
    lines += [
        f"Parameters {own / MB:.1f} MB. Peaks are all bytes alive at once, parameters, gradients and optimizer state "
        "included; seconds are processor time.",
        "",
        "| optimizer | experts recomputed | optimizer state, MB | of the parameters' | kept for the backward pass, MB "
        "| peak of the passes, MB | peak of the update, MB | passes, s | update, s |",
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    memory = [step.memory() for step in steps]
    times = [[step.times() for step in steps] for _ in range(arguments.rounds)]
    for index, (step, (name, recompute)) in enumerate(zip(steps, VARIANTS)):
        state = state_bytes(step.optimizer, step.params)
        passes, update = (statistics.median(values) for values in zip(*(round_[index] for round_ in times)))
        lines.append(
            f"| {name} | {'yes' if recompute else 'no'} | {state / MB:.1f} | {100 * state / own:.2f} % | "
            + " | ".join(f"{size / MB:.1f}" for size in memory[index])
            + f" | {passes:.2f} | {update:.3f} |"
        )
        print(lines[-1], flush=True)
    save(lines, arguments.output)


if __name__ == "__main__":
    main()
