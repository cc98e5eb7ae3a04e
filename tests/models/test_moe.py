"""The MoE block against the per-token reference."""

import naive_moe
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, gradients, randomize, tiny_lm_config
from transformers.integrations import moe as moe_of_the_library

from moe_hf import LstmMoeConfig, LstmMoeModel
from moe_hf.models.balancing import balancing_loss
from moe_hf.models.moe import MoeBlock


def block(seed=0, **changes):
    return randomize(MoeBlock(tiny_lm_config(**changes)), seed).double()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax_top_k"])
@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=6)
@given(mask=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), seed=st.integers(0, 999))
def test_block_is_the_papers_with_all_gradients_and_skips_padding(gating, training, mask, seed):
    mask = torch.tensor(mask).view(2, 3)
    module = block(seed, gating=gating).train(training)
    hidden = draw(2, 3, 8, seed=seed).requires_grad_()
    torch.manual_seed(seed)
    noise = torch.randn(6, 5, dtype=torch.float64)[mask.view(-1)] if training and gating == "noisy_top_k" else None
    torch.manual_seed(seed)
    output, importance, load, counts, _ = module(hidden, mask)
    parameters = dict(module.named_parameters())
    rows, gating = naive_moe.moe_block(list(hidden[mask]), parameters, 2, noise, noise_epsilon=1e-2)

    assert_same(output[mask], torch.stack(rows))
    assert_same(importance, gating.importance)
    assert_same(load, gating.load)
    assert counts.tolist() == gating.counts

    probe = draw(int(mask.sum()), 8, seed=seed + 1)
    loss = (output[mask] * probe).sum() + balancing_loss(importance, load, 0.7, 0.5)
    expected = (torch.stack(rows) * probe).sum() + naive_moe.balancing_loss(gating, 0.7, 0.5)
    inputs = {"hidden": hidden} | {n: p for n, p in parameters.items() if training or n != "gate.noise_weight"}
    actual = gradients(loss, inputs)
    assert_same(actual, gradients(expected, inputs))
    assert (actual["hidden"][~mask] == 0).all()


def test_dense_softmax_gating_mixes_every_expert_by_the_softmax_of_all():
    module, hidden = block(gating="softmax", num_experts_per_tok=None), draw(1, 6, 8).requires_grad_()
    output, importance, load, counts, _ = module(hidden)
    values_TE = (hidden[0] @ module.gate.weight.T).softmax(dim=-1)
    experts = list(zip(module.experts.up_proj, module.experts.down_proj))
    rows = [
        x + torch.sigmoid(sum(value * naive_moe.expert(x, up, down) for value, (up, down) in zip(values, experts)))
        for x, values in zip(hidden[0], values_TE)
    ]
    assert_same(output[0], torch.stack(rows))
    assert_same(importance, values_TE.sum(dim=0))
    assert load.tolist() == counts.tolist() == [6] * 5
    inputs = {"hidden": hidden} | dict(module.named_parameters())
    expected = torch.stack(rows).square().sum()
    assert_same(gradients(output.square().sum(), inputs), gradients(expected, inputs))


def test_content_of_padding_changes_nothing():
    module, mask = block(), torch.tensor([[True, True, False], [False, True, True]])
    hidden = draw(2, 3, 8)
    other = hidden.masked_fill(~mask[..., None], 3.0)
    for first, second in zip(module.eval()(hidden, mask)[:-1], module(other, mask)):  # the last is None
        if first.dim() == 3:
            first, second = first[mask], second[mask]
        assert_same(first, second)


def test_batch_shape_does_not_matter():
    module, hidden = block().eval(), draw(2, 6, 8)
    assert_same(module(hidden.view(4, 3, 8))[0].view(2, 6, 8), module(hidden)[0])


def test_dropout_falls_on_the_sigmoid_before_the_residual_sum():
    module = block(dropout=0.5, gating="softmax_top_k").train()
    hidden = draw(2, 30, 8)
    kept = module.eval()(hidden)[0] - hidden
    torch.manual_seed(0)
    dropped = module.train()(hidden)[0] - hidden
    is_zero = dropped.abs() < 1e-12
    assert 0.4 < is_zero.double().mean() < 0.6
    assert_same(dropped[~is_zero], 2 * kept[~is_zero])


def test_statistics_are_left_out_when_not_needed():
    module, hidden = block().eval(), draw(2, 3, 8)
    output, *statistics = module(hidden, None, False)
    assert statistics == [None] * 4
    assert torch.equal(output, module(hidden)[0])


@pytest.mark.parametrize("changes, implementation", [({}, "moe_hf"), ({"num_expert_layers": 2}, "eager")])
def test_block_alone_chooses_the_implementation_of_a_model_without_changing_the_configuration(
    changes, implementation, monkeypatch
):
    warnings = []
    monkeypatch.setattr(moe_of_the_library.logger, "warning_once", warnings.append)
    config = LstmMoeConfig(hidden_size=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **changes)
    module = MoeBlock(config)
    module(torch.randn(2, 3, 16))
    assert not warnings
    assert module.experts.config._experts_implementation == implementation
    assert LstmMoeModel(config).config._experts_implementation == implementation


def test_block_alone_leaves_the_configuration_and_a_given_implementation_as_they_are():
    config = tiny_lm_config()
    config._experts_implementation = None
    MoeBlock(config)
    assert config._experts_implementation is None
    config._experts_implementation = "batched_mm"
    assert MoeBlock(config).experts.config is config
