"""torch.compile with gates whose shapes depend on the data; a slow test."""

import pytest
import torch
from tiny_models import tiny_lm

from tests.models.test_compile_and_export import model_and_batch

GATINGS = {
    "strictly balanced": {"gating": "strictly_balanced"},
    "hierarchical": {"num_experts": 6, "num_expert_groups": 3, "num_experts_per_tok": 4},
}


@pytest.mark.parametrize("gating", GATINGS)
@torch.no_grad()
def test_the_parts_compute_what_the_model_does(gating):
    model = tiny_lm(experts="moe_hf", **GATINGS[gating])
    _, inputs = model_and_batch("lm")
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager")(**inputs).logits, model(**inputs).logits)
