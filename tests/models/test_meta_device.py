"""A forward pass on the meta device gives shapes, and so sizes, without weights or computation."""

import pytest
import torch
from tiny_models import GNMT, LM

FAMILIES = pytest.mark.parametrize("models", [LM, GNMT], ids=["lm", "gnmt"])


HIERARCHICAL = dict(num_experts=6, num_experts_per_tok=4, num_expert_groups=2, num_groups_per_tok=2)
GATINGS = ("noisy_top_k", "softmax_top_k", "strictly_balanced")
CASES = [({"gating": gating}, training) for gating in GATINGS for training in (False, True)]
CASES += [(HIERARCHICAL, False), (HIERARCHICAL, True)]


@FAMILIES
@pytest.mark.parametrize("changes, is_training", CASES, ids=str)
def test_a_forward_on_the_meta_device(models, changes, is_training):
    with torch.device("meta"):
        model = models.model(torch.float32, experts="moe_hf", **changes).train(is_training)
        ids = torch.zeros(2, 5, dtype=torch.long)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert output.loss.is_meta and output.loss.shape == ()
    assert output.logits is None or (output.logits.is_meta and output.logits.shape == (2, 5, 23))
    if is_training:
        output.loss.backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
