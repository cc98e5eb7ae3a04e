"""How large a language model is and what a token costs, by the paper's convention: embedding and softmax left out."""

import torch

from ..models.configuration_lstm_moe import LstmMoeConfig
from ..models.experts import MoeExperts
from ..models.hierarchical_gating import HierarchicalGate
from ..models.modeling_lstm_moe import LstmMoeModel


def count_parameters(config: LstmMoeConfig) -> int:
    """Number of parameters of all layers, without embedding and softmax. Nothing is allocated, whatever the size."""
    return sum(parameter.numel() for parameter in _layers_without_memory(config).parameters())


def ops_per_timestep(config: LstmMoeConfig) -> int:
    """Multiply-and-adds of the forward pass for one token while training, without embedding and softmax.

    Each matrix that a token meets counts with its number of elements: those of the LSTMs, of the k experts used, and
    W_g and W_noise of the gates, of a hierarchical gate all over the groups and those of the chosen groups. Biases,
    activations and the gate's choice are not multiply-and-adds.
    """
    ops = 0
    for module in _layers_without_memory(config).modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
        if isinstance(module, MoeExperts):
            size = size * config.num_experts_per_tok // config.num_experts
        elif isinstance(module, HierarchicalGate):
            size = size * config.num_groups_per_tok // config.num_expert_groups
        ops += size
    return ops


def _layers_without_memory(config: LstmMoeConfig) -> torch.nn.ModuleList:
    with torch.device("meta"):
        return LstmMoeModel(config).layers
