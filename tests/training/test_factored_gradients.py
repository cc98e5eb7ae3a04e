"""Experts whose gradients are rows against those with dense gradients, and against the formulas in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import GNMT, LM, random_ids, tiny_lm

from moe_hf import FactoredAdam, MoeExperts, clip_grad_norm_, use_factored_gradients
from moe_hf.models.factored_gradients import row_gradients
from moe_hf.training.optimizer import expert_parameters

GATES = {
    "flat": {},
    "hierarchical": {"num_experts": 6, "num_experts_per_tok": 4, "num_expert_groups": 2, "num_groups_per_tok": 2},
    "strictly balanced": {"gating": "strictly_balanced"},
    "softmax": {"gating": "softmax", "num_experts_per_tok": 5},
}
TOLERANCE = {torch.float64: dict(rtol=0, atol=1e-10), torch.float32: dict(rtol=0, atol=1e-6)}


def pair(model):
    """Two equal models, each with its optimizer; the second has factored gradients."""
    models = [model.train(), copy.deepcopy(model).train()]
    for each in models:
        each.set_experts_implementation("moe_hf")
    use_factored_gradients(models[1])
    return models, [FactoredAdam.for_model(each, lr=1e-3, weight_decay=0.1) for each in models]


def batch(seed):
    ids = random_ids(3, 5, seed=seed)
    return {"input_ids": ids, "labels": ids}


def dense_gradients(model):
    """Of the experts, in the order of their parameters."""
    return [
        p.grad if p.grad is not None else sum(r.dense() for r in row_gradients(p)) for p in expert_parameters(model)
    ]


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("family", [LM, GNMT], ids=["lm", "gnmt"])
def test_outputs_and_other_gradients_are_the_same_bits(family, gate):
    (dense, factored), _ = pair(family.model(**GATES[gate]))
    for model in (dense, factored):
        torch.manual_seed(0)
        model(**batch(0)).loss.backward()
    experts = set(expert_parameters(factored))
    for (name, expected), actual in zip(dense.named_parameters(), factored.parameters()):
        if actual in experts:
            assert actual.grad is None, name
        else:
            assert torch.equal(actual.grad, expected.grad), name
    for actual, expected in zip(dense_gradients(factored), dense_gradients(dense)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_hundred_clipped_and_accumulated_steps(gate, dtype):
    models, optimizers = pair(tiny_lm(dtype=dtype, std=0.3, **GATES[gate]))
    for step in range(100):
        for model, optimizer in zip(models, optimizers):
            torch.manual_seed(step)
            for micro in range(2):
                model(**batch(2 * step + micro)).loss.backward()
            norm = clip_grad_norm_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        assert norm > 0.5  # so that clipping matters
    states = [model.state_dict() for model in models]
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, **TOLERANCE[dtype])
