"""How much an expert tells about a token, in bits, compared with chance."""

import numpy as np
import pytest

from moe_hf.routing.specialisation import most_frequent_classes, mutual_information, specialisation


def test_mutual_information_of_a_table_by_hand():
    # Joint 3/8, 1/8, 1/8, 3/8: I = 2 * 3/8 log2(3/8 / (1/4)) + 2 * 1/8 log2(1/8 / (1/4)).
    first = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    second = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    assert mutual_information(first, second) == pytest.approx(0.75 * np.log2(1.5) + 0.25 * np.log2(0.5))
    assert mutual_information(first, first) == pytest.approx(1.0)
    assert mutual_information(first, np.zeros(8, dtype=int)) == pytest.approx(0.0, abs=1e-12)


def test_classes_are_the_most_frequent_tokens_and_one_for_the_rest():
    assert most_frequent_classes(np.array([7, 7, 7, 5, 5, 9, 9, 2]), 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_experts_that_know_the_token_tell_all_and_permuted_ones_next_to_nothing():
    tokens = np.random.default_rng(0).integers(0, 8, 4000)
    found = specialisation(tokens % 4, tokens)
    assert found.bits == pytest.approx(found.expert_entropy) and found.expert_entropy == pytest.approx(2, abs=0.01)
    assert found.class_entropy == pytest.approx(3, abs=0.01)
    assert found.control_mean < 0.01 and found.num_tokens == 4000


def test_what_is_counted_of_independent_experts_is_what_the_control_says():
    random = np.random.default_rng(1)
    for num_experts in (4, 200):
        found = specialisation(random.integers(0, num_experts, 3000), random.zipf(1.3, 3000), num_shuffles=20)
        assert found.control_std > 0
        assert abs(found.bits - found.control_mean) < 4 * found.control_std
    assert found.bits > 0.5  # for 200 experts, all of it chance


def test_tokens_without_expert_or_without_successor_do_not_count():
    experts, tokens = np.array([0, 1, -1, 0, 1, 0]), np.array([3, 4, 3, -1, 4, 3])
    found = specialisation(experts, tokens)
    assert found.num_tokens == 4 and found.bits == pytest.approx(1.0)
    assert specialisation(np.array([-1]), np.array([3])) == (0, 0, 0, 0, 0, 0)


def test_the_same_seed_gives_the_same_control():
    random = np.random.default_rng(2)
    experts, tokens = random.integers(0, 8, 500), random.integers(0, 50, 500)
    assert specialisation(experts, tokens, seed=3) == specialisation(experts, tokens, seed=3)
    assert specialisation(experts, tokens, seed=3) != specialisation(experts, tokens, seed=4)
    with pytest.raises(ValueError, match="num_classes=1"):
        specialisation(experts, tokens, num_classes=1)
