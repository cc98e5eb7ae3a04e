"""Tiny configurations and models with weights large enough that every part of them matters."""

import torch

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

# How generate() may be asked to search.
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam search": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples returned": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def tiny_config(**changes):
    sizes = {
        "vocab_size": 23,
        "scale_embedding": False,  # the weights are large already
        "hidden_size": 8,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    config = LstmMoeConfig(**(sizes | changes))
    config._experts_implementation = "eager"
    return config


def aligned(model):
    """The model with its weights copied. Loaded ones are views of a file, and some processors round a product
    otherwise where an address is no multiple of 64 bytes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def randomize(module, seed=0, std=0.7):
    """Draw every parameter anew from a normal distribution (gates start at zero, which hides mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def tiny_model(dtype=torch.float64, seed=0, std=0.7, experts="eager", **changes):
    """A randomized model in eval mode."""
    model = LstmMoeForCausalLM(tiny_config(**changes))
    model.set_experts_implementation(experts)
    return randomize(model, seed, std).to(dtype).eval()


def random_ids(batch, length, seed=0, vocab_size=23):
    """(B, S) ids, none of them 0, the padding."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(output, inputs):
    """Gradients of a scalar with respect to a dict of tensors; None becomes an error."""
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
