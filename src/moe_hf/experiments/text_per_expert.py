"""Measures how much text an expert sees: pairs per weight, and tokens per expert and step.

A pair is a token and one of the k experts that compute it. N tokens make N k pairs in a MoE layer. Its n experts share
the pairs, so an expert sees N k / n tokens on average. This number over the weights of an expert is its pairs per
weight.

For example, MoE-4096-h of configs/reproduction/capacity.yaml reads 4,400 steps of 4,096 tokens. It has n = 4,096,
k = 4, d = 64 and h = 128:

    tokens per expert and step   4,096 * 4 / 4,096                 = 4
    pairs of an expert           4,400 * 4                         = 17,600
    weights of an expert         2 d h = 2 * 64 * 128              = 16,384
    pairs per weight             17,600 / 16,384                   = 1.07

MoE-4096-h of the paper reads ten times 829 million words in batches of 300,000. It has d = 512 and h = 1,024:

    tokens per expert and step   300,000 * 4 / 4,096               = 293
    pairs of an expert           10 * 829,000,000 * 4 / 4,096      = 8,095,703
    weights of an expert         2 d h = 2 * 512 * 1,024           = 1,048,576
    pairs per weight             8,095,703 / 1,048,576             = 7.7

Groups do not change these numbers: with a hierarchical gate, k is `num_experts_per_tok`, over all groups of a token.
"""

from transformers import PreTrainedConfig

from ..model_size import layers_without_memory
from ..models.configuration_moe import MoeConfig
from ..models.experts import MoeExperts


def weights_per_expert(config: PreTrainedConfig) -> int | None:
    """Return the number of weights of one expert; None for a model without MoE layers."""
    if not isinstance(config, MoeConfig):
        return None
    layers = [module for module in layers_without_memory(config).modules() if isinstance(module, MoeExperts)]
    if not layers:
        return None
    return sum(parameter.numel() for parameter in layers[0].parameters()) // config.num_experts


def tokens_per_expert(config: PreTrainedConfig, tokens: int) -> float | None:
    """Return how many of the tokens that a MoE layer reads go to one expert on average.

    Args:
        config: the model's configuration.
        tokens: the tokens that each MoE layer reads.

    Returns:
        The tokens of one expert; None for a model without MoE layers.
    """
    if weights_per_expert(config) is None:
        return None
    return tokens * config.num_experts_per_tok / config.num_experts


def pairs_per_weight(config: PreTrainedConfig, tokens: int) -> float | None:
    """Return the (token, expert) pairs for each weight of an expert.

    Args:
        config: the model's configuration.
        tokens: the tokens that each MoE layer reads in the whole training.

    Returns:
        The pairs per weight; None for a model without MoE layers.
    """
    weights = weights_per_expert(config)
    return None if weights is None else tokens_per_expert(config, tokens) / weights
