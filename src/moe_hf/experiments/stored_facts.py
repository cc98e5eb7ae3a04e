"""Counts the bits of random facts that a language model has stored: a measure of capacity without a shortage of text.

A fact is a line `symbol symbol value`. Every pair of symbols is one fact, and its value is drawn uniformly from the
same symbols. Nothing but memory predicts a value, so a model without memory needs log2(symbols) bits for each.
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError

# Tokens of a fact: two symbols, the value, and the end of the line. A window of that length holds exactly one fact.
TOKENS_PER_FACT = 4
FACTS_PER_BATCH = 4096


@dataclass
class FactsArguments:
    """The facts to store.

    Attributes:
        num_symbols: number of symbols; there are num_symbols**2 facts of log2(num_symbols) bits each.
        facts_seed: seed of the values.
    """

    num_symbols: int = field(default=256, metadata={"help": "symbols; their pairs are the facts"})
    facts_seed: int = field(default=0, metadata={"help": "seed of the facts' values"})

    def __post_init__(self):
        if self.num_symbols < 2:
            raise InputError(f"num_symbols={self.num_symbols} must be at least 2: one symbol has no bits")


@dataclass
class StoredFacts:
    """What one model has stored.

    Attributes:
        name: the model's name.
        seed: the run's seed.
        parameters: number of parameters, with embedding and softmax.
        ops: operations per token, without embedding and softmax.
        bits: bits of the facts' values that the model stores.
        all_bits: bits of all values.
    """

    name: str
    seed: int
    parameters: int
    ops: int
    bits: float
    all_bits: float


def facts_text(num_symbols: int, seed: int) -> str:
    """Return all facts as lines, in the order of their symbols.

    In this order a fact's first symbol predicts the next line's, which then costs a model no memory.
    """
    draw = random.Random(seed)
    numbers = range(num_symbols)
    return "".join(f"s{i} s{j} s{draw.randrange(num_symbols)}\n" for i in numbers for j in numbers)


@torch.no_grad()
def stored_bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str | Path) -> float:
    """Return the bits of the values that a model stores: all bits, less the model's cross entropy.

    A model that predicts a value worse than a uniform distribution stores negative bits of the value.

    Args:
        model: a language model.
        tokenizer: its tokenizer; each symbol is one token.
        file: lines of `facts_text`.

    Raises:
        InputError: a line is not three tokens.
    """
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
    if wrong := next((line for line, tokens in zip(lines, ids, strict=True) if len(tokens) != 3), None):
        raise InputError(f"{file}: the line {wrong!r} must have three tokens")
    facts = torch.tensor(ids, device=model.device)
    model.eval()
    nats = 0.0
    for part in facts.split(FACTS_PER_BATCH):
        logits = model(input_ids=part[:, :2], use_cache=False).logits[:, -1].double()
        nats += torch.nn.functional.cross_entropy(logits, part[:, 2], reduction="sum").item()
    return all_bits(len(facts)) - nats / math.log(2)


def all_bits(num_facts: int) -> float:
    """Return the bits of all values: log2 of the number of symbols for each fact."""
    return num_facts * math.log2(math.isqrt(num_facts))


def stored_facts_table(rows: list[StoredFacts]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | seed | parameters | operations per token | bits stored | of all bits | bits per parameter |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.seed} | {row.parameters / 1e3:,.0f} k | {row.ops / 1e3:,.1f} k | "
            f"{row.bits / 1e3:,.1f} k | {100 * row.bits / row.all_bits:.1f} % | {row.bits / row.parameters:.2f} |"
        )
    return "\n".join(lines)
