#!/usr/bin/env python3
"""Tokens per second of generate(), against a GPT-2 with as many active parameters and its key-value cache.

    python benchmarks/generation.py [--output benchmarks/results/generation.md]

GPT-2 is measured in two shapes: as shallow as the LSTM-MoE (3 layers of width 480), and with the usual 12 layers
(width 240).

Search is greedy. The clock runs from the first new token to the last, so that the prompt does not count. The models
take turns and the medians are compared: on a noisy machine only ratios hold.
"""

import argparse
import statistics
from pathlib import Path

import torch
from report import add_placement, heading, placement, save, seconds_now
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

VOCAB_SIZE = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up round (default: 3)")
    add_placement(parser)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    positions = max(arguments.contexts) + arguments.new_tokens + 1
    models = {
        "LSTM-MoE": lstm_moe(arguments.num_experts),
        "GPT-2, 3 layers": gpt2(positions, num_layers=3, width=480, num_heads=8),
        "GPT-2, 12 layers": gpt2(positions, num_layers=12, width=240, num_heads=4),
    }
    models = {name: model.to(**placement(arguments)) for name, model in models.items()}
    active = ", ".join(f"{name} {active_parameters(model) / 1e6:.2f} M" for name, model in models.items())
    facts = f"n = {arguments.num_experts}; active parameters without embedding and softmax: {active}"
    lines = [
        *heading("Generation: tokens per second", facts, arguments),
        f"| batch | context | {' | '.join(models)} | over 3 layers | over 12 layers |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for batch in arguments.batches:
        for context in arguments.contexts:
            speeds = tokens_per_second(models, batch, context, arguments.new_tokens, arguments.rounds)
            cells = " | ".join(f"{speed:,.0f}" for speed in speeds.values())
            own, *others = speeds.values()
            ratios = " | ".join(f"{own / other:.2f}" for other in others)
            lines.append(f"| {batch} | {context} | {cells} | {ratios} |")
            print(lines[-1], flush=True)
    save(lines, arguments.output)


def lstm_moe(num_experts: int) -> LstmMoeForCausalLM:
    config = LstmMoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=512, num_experts=num_experts, layer_pattern=["lstm", "moe", "lstm"]
    )
    return LstmMoeForCausalLM(config).eval()


def gpt2(positions: int, num_layers: int, width: int, num_heads: int) -> GPT2LMHeadModel:
    sizes = {"n_embd": width, "n_layer": num_layers, "n_head": num_heads, "n_positions": positions}
    config = GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
    return GPT2LMHeadModel(config).eval()


def active_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters that a token uses, without embeddings and softmax."""
    total = 0
    for name, param in model.named_parameters():
        if any(part in name for part in ("embed", "shared", ".wte", ".wpe", "lm_head")):
            continue
        share = model.config.num_experts_per_tok / model.config.num_experts if ".experts." in name else 1
        total += int(param.numel() * share)
    return total


class Clock(StoppingCriteria):
    """Never stops the search; records the time at which each token was ready."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(seconds_now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)


def tokens_per_second(models: dict, batch: int, context: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Returns the median over the rounds for each model; the models take turns, and a warm-up round does not count."""
    prompt = torch.randint(VOCAB_SIZE, (batch, context))
    options = {"max_new_tokens": 1 + new_tokens, "do_sample": False}
    options["min_new_tokens"] = options["max_new_tokens"]
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            clock = Clock(model.device)
            ids = prompt.to(model.device)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]), **options
            )
            seconds[name].append(clock.times[-1] - clock.times[0])
    return {name: batch * new_tokens / statistics.median(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
