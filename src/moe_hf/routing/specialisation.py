"""Measures the specialisation of experts: mutual information of expert and token in bits, and a random control."""

from typing import NamedTuple

import numpy as np


class Specialisation(NamedTuple):
    """Mutual information between a token's expert and its class, in bits.

    `bits - control_mean` is a conservative estimate: with few tokens per pair of expert and class, the control
    subtracts too much. The estimate is at most the smaller of the two entropies.

    Attributes:
        bits: the mutual information as counted. It is biased upwards, especially with many experts and classes and few
            tokens.
        control_mean: the mean of the mutual information over several random permutations of the experts.
        control_std: the standard deviation over these permutations.
        expert_entropy: entropy of the experts, in bits.
        class_entropy: entropy of the classes, in bits.
        num_tokens: number of tokens counted.
    """

    bits: float
    control_mean: float
    control_std: float
    expert_entropy: float
    class_entropy: float
    num_tokens: int


def specialisation(
    experts: np.ndarray, token_ids: np.ndarray, num_classes: int = 256, num_shuffles: int = 10, seed: int = 0
) -> Specialisation:
    """Measure the mutual information between a token and its strongest expert.

    The `num_classes` - 1 most frequent tokens are classes, and all other tokens are one class. With a class for every
    rare token, a single occurrence would count as a perfect prediction by its expert.

    Args:
        experts: (T,), the expert with the highest gate value for each token; -1 (no expert) is not counted.
        token_ids: (T,), the token that the expert reads, or the token after it; -1 (no token) is not counted.
        num_classes: at least 2.
        num_shuffles: number of permutations for the control, at least 2.
        seed: seed of the permutations.

    Raises:
        ValueError: num_classes or num_shuffles is below 2.
    """
    if num_classes < 2 or num_shuffles < 2:
        raise ValueError(f"num_classes={num_classes} and num_shuffles={num_shuffles} must be at least 2")
    counted = (experts >= 0) & (token_ids >= 0)
    experts, classes = experts[counted], most_frequent_classes(token_ids[counted], num_classes)
    if len(experts) == 0:
        return Specialisation(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    random = np.random.default_rng(seed)
    control = [mutual_information(random.permutation(experts), classes) for _ in range(num_shuffles)]
    return Specialisation(
        mutual_information(experts, classes),
        float(np.mean(control)),
        float(np.std(control, ddof=1)),
        entropy_in_bits(experts),
        entropy_in_bits(classes),
        len(experts),
    )


def bits_of_experts(
    experts: np.ndarray,
    token_ids: np.ndarray,
    num_experts: int,
    num_classes: int = 256,
    num_shuffles: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Return the information of each expert about a token's class in bits, minus the mean of the control.

    It is the divergence D(P(class | expert) || P(class)) between the classes of the expert's tokens and the classes of
    all tokens. The mean over the tokens is the mutual information.

    Args:
        experts: as for `specialisation`.
        token_ids: as for `specialisation`.
        num_experts: E.
        num_classes: as for `specialisation`.
        num_shuffles: as for `specialisation`.
        seed: as for `specialisation`.

    Returns:
        (E,), 0 for an expert without a token.
    """
    counted = (experts >= 0) & (token_ids >= 0)
    experts, classes = experts[counted], most_frequent_classes(token_ids[counted], num_classes)
    if len(experts) == 0:
        return np.zeros(num_experts)
    random = np.random.default_rng(seed)
    control = [_divergences(random.permutation(experts), classes, num_experts) for _ in range(num_shuffles)]
    return _divergences(experts, classes, num_experts) - np.mean(control, axis=0)


def _divergences(experts: np.ndarray, classes: np.ndarray, num_experts: int) -> np.ndarray:
    num_classes = int(classes.max()) + 1
    counts = np.bincount(experts * num_classes + classes, minlength=num_experts * num_classes)
    counts = counts.reshape(num_experts, num_classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ratio = share / (counts.sum(axis=0) / counts.sum())
    return (share * np.log2(ratio, out=np.zeros_like(ratio), where=ratio > 0)).sum(axis=1)


def mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """Return I(A; B) = H(A) + H(B) - H(A, B) in bits, for pairs of non-negative integers (T,) and (T,)."""
    pairs = first.astype(np.int64) * (int(second.max()) + 1) + second
    return max(0.0, entropy_in_bits(first) + entropy_in_bits(second) - entropy_in_bits(pairs))


def entropy_in_bits(values: np.ndarray) -> float:
    """Return the entropy of the relative frequencies of the values (T,), in bits."""
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def most_frequent_classes(token_ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Return a class (T,) for each token: 0 to num_classes - 2 for the most frequent tokens, else the last class.

    Among equally frequent tokens, the lower id comes first.
    """
    ids, place, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(ids))
    return np.minimum(rank, num_classes - 1)[place]
