"""Tiny translation models with weights large enough that every part of them matters, and padded batches for them."""

import torch
from tiny_models import randomize

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration

PAD, START, END = 0, 1, 2
FEEDINGS = ("recurrent", "input", "parallel")


def tiny_config(**changes):
    sizes = {
        "vocab_size": 23,
        "scale_embedding": False,  # the weights are large already
        "hidden_size": 8,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "decoder_start_token_id": START,
    }
    config = GnmtMoeConfig(**(sizes | changes))
    config._experts_implementation = "eager"
    return config


def tiny_model(dtype=torch.float64, seed=0, std=0.7, **changes):
    """A randomized model in eval mode."""
    model = GnmtMoeForConditionalGeneration(tiny_config(**changes))
    model.set_experts_implementation("eager")
    return randomize(model, seed, std).to(dtype).eval()


def sentences(*lengths, seed=0, vocab_size=23):
    """A list of (length,) ids, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def padded(rows, length, side="right", value=9):
    """(B, length) ids and mask; the padding is an ordinary token, so that using it would show."""
    ids, mask = torch.full((len(rows), length), value), torch.zeros(len(rows), length, dtype=torch.long)
    for row, ids_of_row in enumerate(rows):
        start = length - len(ids_of_row) if side == "left" else 0
        ids[row, start : start + len(ids_of_row)] = ids_of_row
        mask[row, start : start + len(ids_of_row)] = 1
    return ids, mask
