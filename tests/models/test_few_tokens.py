"""The experts on one or two tokens on a CPU."""

import pytest
import torch
from tiny_models import assert_same, randomize, tiny_lm_config

from moe_hf.models import segment_experts
from moe_hf.models.experts import MoeExperts
from moe_hf.models.few_tokens import FEW_TOKENS


def experts_of(implementation, dtype):
    config = tiny_lm_config(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12)
    config._experts_implementation = implementation
    return randomize(MoeExperts(config)).to(dtype)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_tokens_get_what_the_reference_gives(num_tokens, dtype, monkeypatch):
    """Also covers a slot of weight 0: an unused slot, or another rank's expert under expert parallelism."""
    monkeypatch.setattr(segment_experts, "_experts", None)  # not called
    x = torch.randn(num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    index, weights = (
        torch.tensor([[4, 0, 2], [2, 4, 6]])[:num_tokens],
        torch.tensor([[0.5, 0.0, 0.5], [0.9, 0.1, 0.0]]),
    )
    weights = weights[:num_tokens].to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        found = experts_of("moe_hf", dtype)(x, index, weights)
        reference = experts_of("eager", dtype).double()(x.double(), index, weights.double())
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert_same(found.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_tokens", "with_gradient"), [(FEW_TOKENS + 1, False), (1, True)])
def test_more_tokens_or_gradients_take_the_segments(num_tokens, with_gradient, monkeypatch):
    experts, calls, segments = experts_of("moe_hf", torch.float64), [], segment_experts._experts
    monkeypatch.setattr(segment_experts, "_experts", lambda *inputs: calls.append(1) or segments(*inputs))
    with torch.set_grad_enabled(with_gradient):
        output = experts(
            torch.ones(num_tokens, 8).double(), torch.zeros(num_tokens, 1).long(), torch.ones(num_tokens, 1)
        )
    assert calls == [1] and output.requires_grad == with_gradient
