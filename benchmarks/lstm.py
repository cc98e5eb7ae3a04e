#!/usr/bin/env python3
"""Time of the LSTM: one token, whole sequences with and without padding, and the two ways of feeding attention.

    python benchmarks/lstm.py [--output benchmarks/results/lstm.md]

All variants are timed in turn, round after round, and the medians are compared: on a noisy machine only ratios hold.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from report import heading, median_seconds, save
from torch import nn

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig
from moe_hf.models.lstm import Lstm, is_fused, run_fused, run_lstm
from moe_hf.models.lstm_kernel import lstm_sequence

WIDTH = 512
SIZES = [(1, None), (32, None), (1, 2048), (32, 2048)]  # batch, units of a projected cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one warm-up round (default: 7)")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args()
    lines = heading("LSTM", f"d = {WIDTH}")
    for table in (one_token, sequences, feeding):
        for line in table(arguments.rounds):
            lines.append(line)
            print(line, flush=True)
    save(lines, arguments.output)


def one_token(rounds: int):
    yield "One token, without gradients; times over torch.nn.LSTM's."
    yield ""
    yield "| batch | units | nn.LSTM | ours | its matrix products alone |"
    yield "|---|---|---|---|---|"
    for batch, units in SIZES:
        lstm, x, h, c = tensors(batch, 1, units)

        def products():
            gates = torch.addmm(lstm.bias, x[:, 0], lstm.weight_ih.t()).addmm_(h[0], lstm.weight_hh.t())
            return gates if lstm.weight_hr is None else c[0] @ lstm.weight_hr.t()

        variants = {
            "torch": lambda: run_fused(x, None, h, c, [lstm], False),
            "ours": lambda: run_lstm(x, None, h, c, [lstm], False),
            "products": products,
        }
        with torch.no_grad():
            times = median_seconds({name: repeated(run, 20) for name, run in variants.items()}, rounds)
        ours, bare = (times[name] / times["torch"] for name in ("ours", "products"))
        yield f"| {batch} | {units or WIDTH} | {times['torch'] / 20 * 1e3:.2f} ms | {ours:.2f} | {bare:.2f} |"
    yield ""


def sequences(rounds: int):
    yield "40 sequences of 35 tokens, forward and backward; a quarter of the positions is padding where there is"
    yield "any. Times over the matrix products of the same shapes, three for each of the forward pass."
    yield ""
    yield "| units | padding | matrix products | torch's kernel | ours | which is used |"
    yield "|---|---|---|---|---|---|"
    for units, padded in ((None, False), (None, True), (2048, False), (2048, True)):
        lstm, x, h, c = tensors(40, 35, units)
        mask = torch.rand(40, 35) > 0.25 if padded else None
        inputs = [x.requires_grad_(), *lstm.parameters()]

        def products():
            flat, steps = x.detach().flatten(0, 1), range(35)
            for _ in range(3):
                flat @ lstm.weight_ih.t()
                for _ in steps:
                    h[0] @ lstm.weight_hh.t()
                    if lstm.weight_hr is not None:
                        c[0] @ lstm.weight_hr.t()

        def ours():
            return lstm_sequence(lstm, x, mask, h[0], c[0])[0]

        variants = {
            "products": torch.no_grad()(products),
            "torch": with_backward(lambda: run_fused(x, mask, h, c, [lstm], True)[0], inputs),
            "ours": with_backward(ours, inputs),
        }
        times = median_seconds(variants, rounds)
        torchs, own = (times[name] / times["products"] for name in ("torch", "ours"))
        used = "torch's" if is_fused(x, mask, lstm) else "ours"
        name = "yes" if padded else "no"
        yield f"| {units or WIDTH} | {name} | {times['products'] * 1e3:.0f} ms | {torchs:.2f} | {own:.2f} | {used} |"
    yield ""


def feeding(rounds: int):
    yield "A training step of a GNMT (3 + 2 LSTM layers, dense, V = 4,000, 40 sentences of 20 tokens) under recurrent"
    yield "feeding of the attention over parallel feeding."
    yield ""
    yield "| d | parallel | recurrent / parallel |"
    yield "|---|---|---|"
    for width in (160, 512):
        variants = {}
        for name in ("parallel", "recurrent"):
            config = GnmtMoeConfig(
                vocab_size=4000,
                hidden_size=width,
                encoder_layer_pattern=["lstm"] * 3,
                decoder_layer_pattern=["lstm"] * 2,
                attention_feeding=name,
                pad_token_id=0,
                decoder_start_token_id=1,
            )
            variants[name] = training_step(GnmtMoeForConditionalGeneration(config).train())
        times = median_seconds(variants, rounds)
        ratio = times["recurrent"] / times["parallel"]
        yield f"| {width} | {times['parallel'] * 1e3:.0f} ms | {ratio:.2f} |"


def tensors(batch: int, length: int, units: int | None):
    """Returns an LSTM, its inputs (B, S, D), and a state for each direction (1, B, D), (1, B, U)."""
    lstm = Lstm(LstmMoeConfig(hidden_size=WIDTH, lstm_hidden_size=units))
    draw = torch.randn
    return lstm, draw(batch, length, WIDTH), draw(1, batch, WIDTH), draw(1, batch, units or WIDTH)


def repeated(run: Callable, times: int) -> Callable:
    return lambda: [run() for _ in range(times)]


def with_backward(run: Callable, inputs: list[torch.Tensor]) -> Callable:
    def both():
        for tensor in inputs:
            tensor.grad = None
        run().sum().backward()

    return both


def training_step(model: nn.Module) -> Callable:
    ids = torch.randint(2, 4000, (40, 20))

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return step


if __name__ == "__main__":
    main()
