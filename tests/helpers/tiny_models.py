"""Tiny models of both families, with weights so large that every part of a model matters, and batches for them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM

PAD, START, END = 0, 1, 2  # translation models have all three, language models only PAD
FEEDINGS = ("recurrent", "input", "parallel")
SIZES = {
    "vocab_size": 23,
    "scale_embedding": False,  # the weights are large already
    "hidden_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "dropout": 0.0,
}

# Search methods of generate().
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam search": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples returned": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def tiny_lm_config(**changes) -> LstmMoeConfig:
    config = LstmMoeConfig(**(SIZES | {"pad_token_id": PAD, "eos_token_id": PAD} | changes))
    config._experts_implementation = "eager"
    return config


def tiny_gnmt_config(**changes) -> GnmtMoeConfig:
    tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    config = GnmtMoeConfig(**(SIZES | tokens | changes))
    config._experts_implementation = "eager"
    return config


def aligned(model):
    """Returns the model with copied weights.

    Loaded weights are views of a file. Some processors round a product differently if an address is not a multiple of
    64 bytes.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def randomize(module, seed=0, std=0.7):
    """Redraws every parameter from a normal distribution: gates start at zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def tiny_lm(dtype=torch.float64, seed=0, std=0.7, experts="eager", **changes) -> LstmMoeForCausalLM:
    """A randomized language model in eval mode."""
    return _tiny(LstmMoeForCausalLM(tiny_lm_config(**changes)), dtype, seed, std, experts)


def tiny_gnmt(dtype=torch.float64, seed=0, std=0.7, experts="eager", **changes) -> GnmtMoeForConditionalGeneration:
    """A randomized translation model in eval mode."""
    return _tiny(GnmtMoeForConditionalGeneration(tiny_gnmt_config(**changes)), dtype, seed, std, experts)


def _tiny(model, dtype, seed, std, experts):
    model.set_experts_implementation(experts)
    return randomize(model, seed, std).to(dtype).eval()


class Family(NamedTuple):
    """The parameters of tests that run for both families."""

    config: Callable
    model: Callable


LM, GNMT = Family(tiny_lm_config, tiny_lm), Family(tiny_gnmt_config, tiny_gnmt)


def random_ids(batch, length, seed=0, vocab_size=23):
    """(B, S) ids without 0, the padding."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def sentences(*lengths, seed=0, vocab_size=23):
    """A list of (length,) ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def padded(rows, length, side="right", value=9):
    """(B, length) ids and mask; the padding is an ordinary token, so that its use would show."""
    ids, mask = torch.full((len(rows), length), value), torch.zeros(len(rows), length, dtype=torch.long)
    for row, ids_of_row in enumerate(rows):
        start = length - len(ids_of_row) if side == "left" else 0
        ids[row, start : start + len(ids_of_row)] = ids_of_row
        mask[row, start : start + len(ids_of_row)] = 1
    return ids, mask


def gradients(output, inputs):
    """Gradients of a scalar with respect to a dict of tensors; a gradient of None is an error."""
    values = torch.autograd.grad(output, list(inputs.values()))
    return dict(zip(inputs, values))


def assert_same(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def dense(output, num_experts):
    """(T, E) gate values of a `GateOutput`."""
    zeros = output.top_k_weights.new_zeros(len(output.top_k_index), num_experts)
    return zeros.scatter_add(1, output.top_k_index, output.top_k_weights)


def naive_dense(gating, num_experts):
    """(T, E) gate values of the reference, in float64."""
    zero = torch.zeros((), dtype=torch.float64)
    rows = [torch.stack([g.get(i, zero) for i in range(num_experts)]) for g in gating.gates]
    return torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
