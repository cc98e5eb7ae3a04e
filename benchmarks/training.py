#!/usr/bin/env python3
"""Tokens per second of whole training steps of language models with the same operations per token (table 7).

    python benchmarks/training.py [--device cuda --dtype bfloat16] [--output benchmarks/results/training.md]

A step is the forward pass, backward pass, gradient clipping and optimizer update, on one batch of random tokens, with
the sampled softmax. The models take turns, step after step, and the medians are compared: on a noisy machine only
ratios hold. All models are in memory at once: about 5 GB for each model with 256 experts.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from report import add_placement, heading, median_seconds, save

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.evaluation import ops_per_timestep
from moe_hf.training.optimizer import FactoredAdam, expert_parameters

MODELS = {
    "MoE-1-Wide": {"num_experts": 1, "num_experts_per_tok": 1},  # its expert has the hidden units of four
    "4xLSTM": {"layer_pattern": ["lstm"] * 4},
    "MoE-32": {"num_experts": 32},
    "MoE-256": {"num_experts": 256},
    "MoE-256-h": {"num_experts": 256, "num_expert_groups": 16},
    "MoE-1024-h": {"num_experts": 1024, "num_expert_groups": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if "1024" not in name])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--moe_intermediate_size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step, in rows of 32 (default: 8192)")
    parser.add_argument("--optimizer", choices=("adamw", "factored_adam"), default="adamw")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps, after one warm-up step (default: 3)")
    add_placement(parser)  # bfloat16 by autocast: the weights stay float32
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    models = {name: build(name, arguments) for name in dict.fromkeys(["MoE-1-Wide", *arguments.models])}
    steps = {name: training_step(model, arguments) for name, model in models.items()}
    times = median_seconds(steps, arguments.rounds, arguments.device)
    facts = (
        f"d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}, k = 4, {arguments.tokens} tokens a "
        f"step, V = 32,000 with 1,024 sampled classes, {arguments.optimizer}"
    )
    lines = [
        *heading("Training steps of models with the same operations per token", facts, arguments),
        "| model | parameters | operations per token | tokens/s | over MoE-1-Wide |",
        "|---|---|---|---|---|",
    ]
    for name, model in models.items():
        speed = arguments.tokens / times[name]
        ratio = times["MoE-1-Wide"] / times[name]
        size, ops = model.num_parameters() / 1e6, ops_per_timestep(model.config) / 1e6
        lines.append(f"| {name} | {size:.0f} M | {ops:.2f} M | {speed:,.0f} | {ratio:.2f} |")
    print("\n".join(lines))
    save(lines, arguments.output)


def build(name: str, arguments) -> LstmMoeForCausalLM:
    hidden = arguments.moe_intermediate_size * (4 if name == "MoE-1-Wide" else 1)
    config = {"layer_pattern": ["lstm", "moe", "lstm"], "num_experts_per_tok": 4} | MODELS[name]
    model = LstmMoeForCausalLM(
        LstmMoeConfig(
            vocab_size=32000,
            num_sampled=1024,
            hidden_size=arguments.hidden_size,
            moe_intermediate_size=hidden,
            **config,
        )
    )
    return model.to(arguments.device).train()


def training_step(model: LstmMoeForCausalLM, arguments) -> Callable[[], None]:
    experts = expert_parameters(model) if arguments.optimizer == "factored_adam" else []
    if experts:
        ids = {id(param) for param in experts}
        others = [param for param in model.parameters() if id(param) not in ids]
        optimizer = FactoredAdam([{"params": experts, "factored": True}, {"params": others}], lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(model.config.vocab_size, (arguments.tokens // 32, 33), device=arguments.device)
    autocast = torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16")

    def step() -> None:
        with autocast:
            loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
