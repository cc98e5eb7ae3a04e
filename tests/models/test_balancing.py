"""Balancing statistics and losses against the per-token reference."""

import math

import naive_moe
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same

from moe_hf.models.balancing import (
    balancing_loss,
    cv_squared,
    importance,
    normal_cdf,
    probability_in_top_k,
    tokens_per_expert,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(clean, noisy, stddev, k):
    return probability_in_top_k(clean, noisy, stddev, noisy.topk(k + 1, dim=-1).values)


def test_importance_sums_the_gate_values_of_each_expert():
    index = torch.tensor([[0, 2], [2, 1]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    values = importance(index, weights, 4)
    assert values.tolist() == [0.75, 0.5, 0.75, 0.0]
    assert torch.autograd.grad(values[2], weights)[0].tolist() == [[0, 1], [1, 0]]


def test_tokens_per_expert_skips_slots_of_weight_zero():
    index = torch.tensor([[0, 2], [2, 1]])
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0]], requires_grad=True)
    counts = tokens_per_expert(index, weights, 4)
    assert counts.tolist() == [1, 0, 2, 0] and not counts.requires_grad


def test_normal_cdf_at_known_points():
    known = [math.erfc(1.5 / math.sqrt(2)) / 2, 0.5, 0.8413447460685429]
    assert_same(
        normal_cdf(torch.tensor([-1.5, 0.0, 1.0], dtype=torch.float64)), torch.tensor(known, dtype=torch.float64)
    )


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 5), experts=st.integers(2, 6), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_probability_in_top_k_is_the_papers_for_every_expert(tokens, experts, k, seed):
    k = min(k, experts - 1)
    clean = draw(seed, tokens, experts).requires_grad_()
    stddev = draw(seed + 1, tokens, experts).exp().requires_grad_()
    noisy = clean + stddev * draw(seed + 2, tokens, experts)
    expected = torch.stack(
        [
            torch.stack([naive_moe.probability_in_top_k(c, n, s, k, i) for i in range(experts)])
            for c, n, s in zip(clean, noisy, stddev)
        ]
    )
    actual = probabilities(clean, noisy, stddev, k)
    assert_same(actual, expected)
    probe = draw(seed + 3, tokens, experts)
    for got, wanted in zip(
        torch.autograd.grad((actual * probe).sum(), [clean, stddev], retain_graph=True),
        torch.autograd.grad((expected * probe).sum(), [clean, stddev]),
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_probability_is_the_frequency_of_selection_when_one_experts_noise_is_redrawn(k):
    draws, experts = 40_000, 5
    clean, stddev = draw(0, experts), 0.3 + draw(1, experts).abs()
    noisy = clean + stddev * draw(2, experts)
    claimed = probabilities(clean[None], noisy[None], stddev[None], k)[0]
    for i in range(experts):
        redrawn = noisy.repeat(draws, 1)
        redrawn[:, i] = clean[i] + stddev[i] * draw(3 + i, draws)
        frequency = (redrawn.topk(k, dim=-1).indices == i).any(dim=-1).double().mean()
        error = (claimed[i] * (1 - claimed[i]) / draws).sqrt()
        assert (frequency - claimed[i]).abs() <= 5 * error + 1 / draws


def test_probabilities_sum_to_k_on_average_over_the_noise():
    draws, experts, k = 20_000, 6, 2
    clean, stddev = draw(0, 1, experts).expand(draws, -1), (0.3 + draw(1, 1, experts).abs()).expand(draws, -1)
    sums = probabilities(clean, clean + stddev * draw(2, draws, experts), stddev, k).sum(dim=-1)
    assert (sums.mean() - k).abs() < 5 * sums.std() / draws**0.5


@settings(deadline=None, max_examples=20)
@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda values: sum(values) > 1e-3))
def test_cv_squared_is_population_variance_over_squared_mean(values):
    values = torch.tensor(values, dtype=torch.float64)
    assert_same(cv_squared(values), naive_moe.cv_squared(values))


def test_cv_squared_of_no_tokens_is_zero_with_a_zero_gradient():
    for dtype in (torch.float32, torch.float64):
        values = torch.zeros(4, dtype=dtype, requires_grad=True)
        loss = cv_squared(values)
        loss.backward()
        assert loss.item() == 0 and values.grad.tolist() == [0, 0, 0, 0]


def test_cv_squared_of_one_expert_holding_everything_is_n_minus_one():
    assert cv_squared(torch.tensor([0.0, 0.0, 8.0, 0.0])).item() == 3


def test_cv_squared_does_not_depend_on_the_scale():
    values = draw(0, 6).abs()
    assert_same(cv_squared(values * 1e-6), cv_squared(values))
    assert_same(cv_squared(values * 1e6), cv_squared(values))


def test_balancing_loss_weighs_both_terms():
    importances, loads = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])
    assert balancing_loss(importances, loads, 0.5, 0.25).item() == 0.5 * 1 + 0.25 * 0.25
