#!/usr/bin/env python3
"""Tokens per second of generate(), against a GPT-2 of the same active parameters with its key-value cache.

    python benchmarks/generation.py [--output benchmarks/results/generation.md]

Greedy. The time of a token is the difference of two calls, with one new token and with more, so that the prompt does
not count. The models take turns and medians are compared: on a noisy machine only ratios hold.
"""

import argparse
from pathlib import Path

import torch
from report import heading, median_seconds, save
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

VOCAB_SIZE = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that is not (default: 3)")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    models = {
        "LSTM-MoE": lstm_moe(arguments.num_experts),
        "GPT-2": gpt2(max(arguments.contexts) + arguments.new_tokens + 1),
    }
    active = ", ".join(f"{name} {active_parameters(model) / 1e6:.2f} M" for name, model in models.items())
    facts = f"n = {arguments.num_experts}; active parameters without embedding and softmax: {active}"
    lines = [
        *heading("Generation: tokens per second", facts),
        "| batch | context | LSTM-MoE | GPT-2 | ratio |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for batch in arguments.batches:
        for context in arguments.contexts:
            speeds = tokens_per_second(models, batch, context, arguments.new_tokens, arguments.rounds)
            cells = " | ".join(f"{speed:,.0f}" for speed in speeds.values())
            lines.append(f"| {batch} | {context} | {cells} | {speeds['LSTM-MoE'] / speeds['GPT-2']:.2f} |")
            print(lines[-1], flush=True)
    save(lines, arguments.output)


def lstm_moe(num_experts: int) -> LstmMoeForCausalLM:
    config = LstmMoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=512, num_experts=num_experts, layer_pattern=["lstm", "moe", "lstm"]
    )
    return LstmMoeForCausalLM(config).eval()


def gpt2(positions: int) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=480, n_layer=3, n_head=8, n_positions=positions)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return GPT2LMHeadModel(config).eval()


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token uses, without embeddings and softmax."""
    total = 0
    for name, param in model.named_parameters():
        if any(part in name for part in ("embed", "shared", ".wte", ".wpe", "lm_head")):
            continue
        share = model.config.num_experts_per_tok / model.config.num_experts if ".experts." in name else 1
        total += int(param.numel() * share)
    return total


def tokens_per_second(models: dict, batch: int, context: int, new_tokens: int, rounds: int) -> dict[str, float]:
    prompt = torch.randint(VOCAB_SIZE, (batch, context))
    mask = torch.ones_like(prompt)
    variants = {
        (name, number): lambda model=model, number=number: model.generate(
            prompt, attention_mask=mask, max_new_tokens=number, min_new_tokens=number, do_sample=False
        )
        for name, model in models.items()
        for number in (1, 1 + new_tokens)
    }
    times = median_seconds(variants, rounds)
    return {name: batch * new_tokens / (times[name, 1 + new_tokens] - times[name, 1]) for name in models}


if __name__ == "__main__":
    main()
