"""The strictly balanced gate against the per-token reference, and its further guarantees."""

from contextlib import nullcontext

import naive_moe
import pytest
import torch
from device_path import device_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, dense, gradients, naive_dense, randomize

from moe_hf import StrictlyBalancedGate
from moe_hf.models.balanced_gating import batchwise_loss, batchwise_mask, threshold_mask, tokens_for_each_expert

WIDTH = 4
ON_DEVICE = pytest.mark.parametrize("on_device", [False, True])


def balanced_gate(experts=5, k=2, seed=0, std=0.7):
    gate = randomize(StrictlyBalancedGate(WIDTH, experts, k), seed, std).double()
    generator = torch.Generator().manual_seed(seed)
    gate.threshold.data = 2 / experts * torch.rand(experts, generator=generator, dtype=torch.float64)
    return gate


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(gate, hidden, mask=None, on_device=False):
    """Weights, statistics, loss and all gradients equal the reference's on only the real tokens."""
    num_experts, real = gate.num_experts, torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask
    with device_path() if on_device else nullcontext():
        output = gate(hidden.requires_grad_(), mask)
    expected = naive_moe.strictly_balanced_gate(
        list(hidden[real]), gate.weight, gate.threshold, gate.num_experts_per_tok, gate.training
    )
    values_TE, expected_TE = dense(output, num_experts), naive_dense(expected, num_experts)
    assert_same(values_TE[real], expected_TE)
    assert (values_TE[~real] == 0).all()
    assert ((output.top_k_index >= 0) & (output.top_k_index < num_experts)).all()
    if on_device:
        assert output.top_k_index.tolist() == [list(range(num_experts))] * len(hidden)
    else:
        assert (output.top_k_weights.diff(dim=-1) <= 0).all()
        assert output.top_k_index.shape[1] == max([1, *map(len, expected.gates)])
    assert_same(output.router_logits, hidden @ gate.weight.T)
    assert_same(output.importance, expected.importance)
    assert output.load.tolist() == output.tokens_per_expert.tolist() == expected.counts
    assert_same(output.threshold_loss, expected.threshold_loss)
    assert output.threshold_loss >= 0

    probe_TE = draw(99, *expected_TE.shape)
    inputs = {"hidden": hidden, "weight": gate.weight, "threshold": gate.threshold}
    probe_E = draw(98, num_experts)
    total = (values_TE[real] * probe_TE).sum() + (output.importance * probe_E).sum() + 3 * output.threshold_loss
    wanted = (expected_TE * probe_TE).sum() + (expected.importance * probe_E).sum() + 3 * expected.threshold_loss
    actual = gradients(total, inputs)
    assert_same(actual, gradients(wanted, inputs))
    assert (actual["hidden"][~real] == 0).all()
    return output, expected


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 8), experts=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_gate_is_appendix_f_with_all_gradients(training, tokens, experts, k, seed):
    gate = balanced_gate(experts, min(k, experts), seed).train(training)
    output, expected = check(gate, draw(seed + 1, tokens, WIDTH))
    if training:
        assert expected.counts == [tokens_for_each_expert(tokens, experts, min(k, experts))] * experts


@ON_DEVICE
@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=15)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=9).filter(any), seed=st.integers(0, 999))
def test_padding_takes_no_places(training, on_device, mask, seed):
    gate, mask = balanced_gate(seed=seed).train(training), torch.tensor(mask)
    output, _ = check(gate, draw(seed, len(mask), WIDTH), mask, on_device)
    if training:
        m = tokens_for_each_expert(int(mask.sum()), 5, 2)
        assert output.tokens_per_expert.tolist() == [m] * 5


@pytest.mark.parametrize("training", [True, False])
def test_a_token_may_have_no_expert_or_more_than_k(training):
    gate = balanced_gate(experts=6, k=1, seed=3).train(training)
    gate.threshold.data.fill_(0.3)
    output, expected = check(gate, draw(1, 12, WIDTH))
    per_token = [len(g) for g in expected.gates]
    assert min(per_token) == 0 and max(per_token) > 1
    sums = output.top_k_weights.sum(dim=-1)
    assert_same(sums, torch.tensor([float(number > 0) for number in per_token]).double())


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "m"),
    [
        (8, 4, 2, 4),
        (7, 5, 2, 3),  # 2.8
        (6, 5, 2, 2),  # 2.4
        (5, 4, 2, 3),  # 2.5: halves round up
        (3, 2, 1, 2),  # 1.5
        (3, 32, 4, 1),  # 0.375: at least 1
        (1, 3, 2, 1),
        (5, 3, 3, 5),
        (0, 3, 2, 0),
    ],
)
def test_m_is_the_nearest_integer_at_least_one_and_at_most_every_token(tokens, experts, k, m):
    assert tokens_for_each_expert(tokens, experts, k) == m
    gate = balanced_gate(experts, k)
    assert gate(draw(0, tokens, WIDTH)).tokens_per_expert.tolist() == [m] * experts


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=12),
    m=st.integers(0, 12),
    padding=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_batchwise_mask_keeps_the_m_highest_and_the_earlier_of_equals(values, m, padding):
    gates, is_token = torch.tensor(values).double() / 2, ~torch.tensor(padding[: len(values)])[:, None]
    real = [t for t in range(len(values)) if is_token[t]]
    m = min(m, len(real))
    mask = batchwise_mask(gates, m, is_token)
    for expert in range(3):
        kept = sorted(real, key=lambda t: -gates[t, expert].item())[:m]
        assert mask[:, expert].nonzero().flatten().tolist() == sorted(kept)


def test_a_value_at_its_threshold_does_not_pass():
    is_token, threshold = torch.tensor([[True], [True], [False]]), torch.tensor([0.25, 0.5])
    gates = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.75, 0.75]])
    assert threshold_mask(gates, threshold, is_token).tolist() == [[False, True], [True, False], [False, False]]


def test_threshold_loss_is_zero_only_where_the_masks_agree():
    gates = torch.tensor([[0.5, 0.2], [0.3, 0.4], [0.1, 0.3]], dtype=torch.float64)
    is_token = torch.ones(3, 1, dtype=torch.bool)
    by_batch = batchwise_mask(gates, 1, is_token)

    def loss(*threshold):
        threshold = torch.tensor(threshold, dtype=torch.float64, requires_grad=True)
        value = batchwise_loss(gates, threshold, threshold_mask(gates, threshold, is_token), by_batch)
        return value.item(), torch.autograd.grad(value, threshold)[0].tolist()

    assert loss(0.35, 0.35) == (0, [0, 0])
    assert loss(0.2, 0.35) == (pytest.approx(0.1), [-1, 0])  # one too many for expert 0: its threshold must rise
    assert loss(0.35, 0.6) == (pytest.approx(0.2), [0, 1])


def test_evaluation_of_a_token_does_not_depend_on_the_batch():
    gate, hidden = balanced_gate().eval(), draw(0, 12, WIDTH)
    together = dense(gate(hidden), 5)
    assert_same(torch.cat([dense(gate(row[None]), 5) for row in hidden]), together)
    assert not torch.allclose(dense(gate.train()(hidden), 5), together)


def test_underflow_keeps_the_places_and_makes_no_nan():
    gate = StrictlyBalancedGate(1, 4, 2)
    gate.weight.data[:] = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    hidden = torch.tensor([[300.0], [-300.0], [280.0], [-280.0]], requires_grad=True)  # G_sigma is 0 or 1 in float32
    output = gate(hidden)
    assert output.tokens_per_expert.tolist() == [2] * 4
    assert output.top_k_weights.isfinite().all()
    (output.top_k_weights.square().sum() + output.threshold_loss).backward()
    assert hidden.grad.isfinite().all() and gate.weight.grad.isfinite().all()


@ON_DEVICE
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, torch.zeros(5, dtype=torch.bool)])
def test_without_any_token_all_is_zero_and_no_gradient_is_none(training, on_device, mask):
    gate, tokens = balanced_gate().train(training), 0 if mask is None else 5
    with device_path() if on_device else nullcontext():
        output = gate(draw(0, tokens, WIDTH), mask)
    assert output.top_k_index.shape == output.top_k_weights.shape == (tokens, 5 if on_device else 1)
    for statistic in (output.importance, output.load, output.tokens_per_expert):
        assert statistic.tolist() == [0] * 5
    loss = output.top_k_weights.sum() + output.importance.sum() + output.threshold_loss
    for grad in gradients(loss, dict(gate.named_parameters())).values():
        assert (grad == 0).all()


def test_a_new_gate_spreads_the_tokens():
    torch.manual_seed(0)
    gate, hidden = StrictlyBalancedGate(16, 8, 2), torch.randn(400, 16)
    per_token = (gate(hidden).top_k_weights > 0).sum(dim=-1)
    assert (per_token > 0).float().mean() > 0.8
    assert_same(gate.threshold.detach(), torch.full((8,), 1 / 8))
    gate.weight.data.zero_()  # a bad start: every expert chooses the same first tokens
    per_token = (gate(hidden).top_k_weights > 0).sum(dim=-1)
    assert per_token.tolist() == [8] * 100 + [0] * 300


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_left_out_when_not_needed(training):
    gate, hidden = balanced_gate().train(training), draw(0, 7, WIDTH)
    output = gate(hidden, None, False)
    assert set(output[3:]) == {None}
    assert torch.equal(output.top_k_weights, gate(hidden).top_k_weights)


@pytest.mark.parametrize("training", [True, False])
def test_gating_is_float32_under_autocast_and_with_bfloat16_weights(training):
    gate = balanced_gate().float().train(training)
    hidden = draw(0, 50, WIDTH).bfloat16()
    plain = gate(hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = gate(hidden)
    for name in ("top_k_index", "top_k_weights", "router_logits", "importance", "load", "threshold_loss"):
        actual = getattr(output, name)
        assert actual.dtype == (torch.int64 if name == "top_k_index" else torch.float32)
        assert torch.equal(actual, getattr(plain, name)), name
    output = gate.bfloat16()(hidden)
    assert {output.top_k_weights.dtype, output.importance.dtype, output.threshold_loss.dtype} == {torch.float32}


@pytest.mark.parametrize("k", [0, 6])
def test_impossible_k_is_refused_with_the_values(k):
    with pytest.raises(ValueError, match=f"num_experts_per_tok={k} .*num_experts=5"):
        StrictlyBalancedGate(4, 5, k)
