"""Gates against the per-token reference, and their further guarantees."""

import functools
import warnings

import naive_moe
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, dense, gradients, naive_dense, randomize, tiny_lm_config

from moe_hf import LstmMoeForCausalLM, MoeBlock
from moe_hf.models.balancing import balancing_loss, cv_squared
from moe_hf.models.gating import NoisyTopKGate, SoftmaxTopKGate
from moe_hf.models.hierarchical_gating import HierarchicalGate

EPSILON = 0.05


def noisy_gate(width=4, experts=5, k=2, seed=0, dtype=torch.float64):
    return randomize(NoisyTopKGate(width, experts, k, noise_epsilon=EPSILON), seed).to(dtype)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(gate, hidden, mask=None, seed=7):
    """The gate's output under a known noise, and that noise."""
    torch.manual_seed(seed)
    noise = torch.randn(len(hidden), gate.num_experts, dtype=torch.promote_types(hidden.dtype, torch.float32))
    torch.manual_seed(seed)
    return gate(hidden, mask), noise


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=12)
@given(tokens=st.integers(1, 6), experts=st.integers(2, 6), k=st.integers(2, 6), seed=st.integers(0, 999))
def test_noisy_gate_is_the_papers_with_all_gradients(training, tokens, experts, k, seed):
    k = min(k, experts)
    gate = noisy_gate(4, experts, k, seed).train(training)
    hidden = draw(seed + 1, tokens, 4).requires_grad_()
    output, noise = run(gate, hidden)
    expected = naive_moe.gate(hidden, gate.weight, k, gate.noise_weight, noise if training else None, EPSILON)

    assert [set(row.tolist()) for row in output.top_k_index] == [set(g) for g in expected.gates]
    assert_same(dense(output, experts), naive_dense(expected, experts))
    assert_same(output.router_logits, hidden @ gate.weight.T)
    assert_same(output.importance, expected.importance)
    assert_same(output.load, expected.load)
    assert output.tokens_per_expert.tolist() == expected.counts
    loss = balancing_loss(output.importance, output.load, 0.3, 0.2)
    expected_loss = naive_moe.balancing_loss(expected, 0.3, 0.2)
    assert_same(loss, expected_loss)

    probe = draw(seed + 2, tokens, experts)
    inputs = {"hidden": hidden, "weight": gate.weight} | ({"noise": gate.noise_weight} if training else {})
    actual = gradients((dense(output, experts) * probe).sum() + loss, inputs)
    assert_same(actual, gradients((naive_dense(expected, experts) * probe).sum() + expected_loss, inputs))


@settings(deadline=None, max_examples=8)
@given(experts=st.integers(2, 6), k=st.integers(2, 6), seed=st.integers(0, 999))
def test_softmax_gate_is_the_softmax_renormalised_over_the_kept(experts, k, seed):
    k = min(k, experts)
    gate = randomize(SoftmaxTopKGate(4, experts, k), seed).double()
    hidden = draw(seed + 1, 3, 4)
    output = gate(hidden)
    full = (hidden @ gate.weight.T).softmax(dim=-1)
    kept = full.topk(k, dim=-1)
    assert torch.equal(output.top_k_index, kept.indices)
    assert_same(output.top_k_weights, kept.values / kept.values.sum(dim=-1, keepdim=True))
    assert_same(output.importance, dense(output, experts).sum(dim=0))
    assert_same(output.load, (dense(output, experts) > 0).double().sum(dim=0))


def test_weights_come_highest_first_and_sum_to_one():
    output = noisy_gate(k=3)(draw(0, 6, 4))
    assert (output.top_k_weights.diff(dim=-1) <= 0).all()
    assert_same(output.top_k_weights.sum(dim=-1), torch.ones(6).double())


def test_zero_initialised_gates_load_the_experts_equally():
    tokens, experts, k = 4000, 8, 2
    gate = NoisyTopKGate(4, experts, k)
    torch.manual_seed(0)
    output = gate(torch.randn(tokens, 4))
    share, error = tokens * k / experts, (tokens * k / experts * (1 - k / experts)) ** 0.5
    assert (output.tokens_per_expert - share).abs().max() < 5 * error
    assert (output.load - share).abs().max() < 5 * error
    assert (output.importance - tokens / experts).abs().max() < 5 * error
    assert output.router_logits.abs().max() == 0


def test_evaluation_is_noiseless_and_repeatable_and_training_is_not():
    gate, hidden = noisy_gate(), draw(0, 20, 4)
    first, second = gate.eval()(hidden), gate(hidden)
    assert torch.equal(first.top_k_weights, second.top_k_weights)
    assert torch.equal(first.top_k_index, (hidden @ gate.weight.T).topk(2, dim=-1).indices)
    gate.train()
    first, second = gate(hidden), gate(hidden)
    assert not torch.equal(first.top_k_weights, second.top_k_weights)
    assert not torch.equal(first.top_k_index, second.top_k_index)


def test_noise_epsilon_is_the_least_standard_deviation():
    gate = NoisyTopKGate(1, 4, 2, noise_epsilon=0.25).double()
    gate.noise_weight.data.fill_(-100.0)
    hidden = torch.ones(6, 1).double()
    output, noise = run(gate, hidden)
    expected = (0.25 * noise).topk(2, dim=-1)
    assert torch.equal(output.top_k_index, expected.indices)
    assert_same(output.top_k_weights, expected.values.softmax(dim=-1))


def test_using_every_expert_makes_load_the_token_counts_and_its_loss_zero():
    gate, hidden = noisy_gate(experts=3, k=3), draw(0, 7, 4)
    output = gate(hidden)
    assert output.load.tolist() == [7, 7, 7] and cv_squared(output.load).item() == 0
    grads = gradients(balancing_loss(output.importance, output.load, 0.1, 0.1), dict(gate.named_parameters()))
    for grad in grads.values():
        assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("gate_class", [NoisyTopKGate, SoftmaxTopKGate])
def test_one_expert_per_token_warns_unless_there_is_only_one(gate_class):
    with pytest.warns(UserWarning, match="num_experts_per_tok=1"):
        gate_class(4, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate = gate_class(4, 1, 1)
        gate_class(4, 3, 2)
    assert gate(torch.randn(3, 4)).top_k_weights.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("gate_class", [NoisyTopKGate, SoftmaxTopKGate])
def test_impossible_k_is_refused_with_the_values(gate_class, k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok={k} .*num_experts=5"):
        gate_class(4, 5, k)


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=10)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_masked_tokens_are_neither_routed_nor_counted(training, mask, seed):
    mask = torch.tensor(mask)
    gate = noisy_gate(seed=seed).train(training)
    hidden = draw(seed, len(mask), 4).requires_grad_()
    output, noise = run(gate, hidden, mask)
    expected = naive_moe.gate(
        hidden[mask], gate.weight, 2, gate.noise_weight, noise[mask] if training else None, EPSILON
    )
    assert (output.top_k_weights[~mask] == 0).all()
    assert ((output.top_k_index >= 0) & (output.top_k_index < 5)).all()
    assert_same(output.importance, expected.importance)
    assert output.tokens_per_expert.tolist() == expected.counts
    if mask.any():
        assert_same(output.load, expected.load)
        loss = balancing_loss(output.importance, output.load, 1.0, 1.0)
        expected_loss = naive_moe.balancing_loss(expected, 1.0, 1.0)
        inputs = {"hidden": hidden, "weight": gate.weight}
        actual = gradients(loss, inputs)
        assert_same(actual, gradients(expected_loss, inputs))
        assert (actual["hidden"][~mask] == 0).all()
    else:
        assert output.load.tolist() == [0] * 5


@pytest.mark.parametrize("gate_class", [NoisyTopKGate, SoftmaxTopKGate])
def test_gating_is_float32_under_autocast(gate_class):
    gate = randomize(gate_class(16, 12, 3)).train()
    for dtype in (torch.float32, torch.bfloat16):
        hidden = draw(0, 50, 16).to(dtype)
        plain, _ = run(gate, hidden.float())
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = gate(hidden)
        for name in ("top_k_index", "top_k_weights", "router_logits", "importance", "load"):
            actual = getattr(output, name)
            assert actual.dtype == (torch.int64 if name == "top_k_index" else torch.float32)
            assert torch.equal(actual, getattr(plain, name)), name


def test_float64_stays_float64_and_bfloat16_weights_are_gated_in_float32():
    output, _ = run(noisy_gate(), draw(0, 3, 4))
    assert {output.top_k_weights.dtype, output.importance.dtype, output.load.dtype} == {torch.float64}
    output, _ = run(noisy_gate(dtype=torch.bfloat16), draw(0, 3, 4).bfloat16())
    assert {output.top_k_weights.dtype, output.importance.dtype, output.load.dtype} == {torch.float32}


def test_statistics_are_left_out_when_not_needed():
    gate, hidden = noisy_gate().eval(), draw(0, 3, 4)
    output = gate(hidden, None, False)
    assert (output.importance, output.load, output.tokens_per_expert) == (None, None, None)
    assert torch.equal(output.top_k_weights, gate(hidden).top_k_weights)


@pytest.mark.parametrize("gate_std", [0.0, 3.0])
@pytest.mark.parametrize(
    "gate_class", [NoisyTopKGate, SoftmaxTopKGate, functools.partial(HierarchicalGate, num_expert_groups=8)]
)
def test_gate_std_is_the_deviation_of_the_first_logits(gate_class, gate_std):
    torch.manual_seed(0)
    gate = gate_class(100, 64, 4, gate_std=gate_std)
    weights = [gate.weight.flatten(0, -2), *([gate.primary.weight] if hasattr(gate, "primary") else [])]
    for weight in weights:
        logits = torch.randn(500, 100) @ weight.T
        assert logits.std().item() == pytest.approx(gate_std, rel=0.1)
    assert all(weight.eq(0).all() for name, weight in gate.named_parameters() if "noise" in name)


@pytest.mark.parametrize("changes", [{}, {"gating": "softmax_top_k"}, {"num_experts": 16, "num_expert_groups": 4}])
def test_a_new_models_gates_start_as_gate_std_says(changes):
    for gate_std in (0.0, 2.0):
        config = tiny_lm_config(num_experts_per_tok=4, gate_std=gate_std, **changes)
        for block in (LstmMoeForCausalLM(config).model.layers[1], MoeBlock(config)):
            assert bool(block.gate.weight.any()) == bool(gate_std)


def test_a_gate_that_starts_decided_chooses_the_same_experts_with_noise_and_without():
    torch.manual_seed(0)
    x, chosen_again = torch.randn(200, 32), {}
    for gate_std in (0.0, 6.0):
        gate = HierarchicalGate(32, 1024, 4, 16, gate_std=gate_std)
        without = gate.eval()(x).top_k_index
        noisy = gate.train()(x).top_k_index
        chosen_again[gate_std] = (without[:, :, None] == noisy[:, None]).any(-1).float().mean().item()
    assert chosen_again[0.0] < 0.1 and chosen_again[6.0] > 0.6
