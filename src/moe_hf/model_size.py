"""Counts a model's parameters and operations per token, by the paper's convention: without embedding and softmax."""

import os

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from .errors import InputError
from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_moe import MoeConfig
from .models.experts import MoeExperts
from .models.hierarchical_gating import HierarchicalGate
from .models.modeling_gnmt_moe import GnmtMoeModel
from .models.modeling_lstm_moe import LstmMoeModel

BYTES = 4  # of a float32 value, the dtype of a new model


def count_parameters(config: MoeConfig) -> int:
    """Return the number of parameters without embedding and softmax, without allocating the model."""
    return sum(parameter.numel() for parameter in layers_without_memory(config).parameters())


def count_embedding_parameters(config: MoeConfig) -> int:
    """Return the number of parameters of embedding and softmax; a shared matrix counts once."""
    embeddings = 2 if isinstance(config, GnmtMoeConfig) and not config.share_embeddings else 1
    return (embeddings + (not config.tie_word_embeddings)) * config.vocab_size * config.hidden_size


def ops_per_timestep(config: MoeConfig) -> int:
    """Return the multiply-adds of the forward pass for one token in training, without embedding and softmax.

    Each matrix that multiplies a token counts with its number of elements: the matrices of the LSTMs, of the k
    experts, and the gates' W_g and W_noise. For a hierarchical gate, the matrix over the groups and the matrices of
    the chosen groups count. Biases, activations and the choice of experts do not count.

    A time step of a translation model is one source token in the encoder and one target token in the decoder, with the
    attention's U and W. The attention's scores and weighted sum grow with the source's length and do not count.
    """
    ops = 0
    for module in layers_without_memory(config).modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
        if isinstance(module, MoeExperts):
            size = size * config.num_experts_per_tok // config.num_experts
        elif isinstance(module, HierarchicalGate):
            size = size * config.num_groups_per_tok // config.num_expert_groups
        ops += size
    return ops


def size_of_any(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the parameters and operations per token of any model, without embedding and softmax."""
    if isinstance(config, MoeConfig):
        return count_parameters(config), ops_per_timestep(config)
    return size_of_baseline(config)


def size_of_baseline(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the parameters and operations per token of a model of Transformers, counted as for this package's models.

    Token embeddings, position embeddings and softmax do not count. In a decoder-only model, the attention over a full
    window counts: a token attends to half of the positions on average. Each position costs two multiply-adds per
    element of the width, for score and sum. In an encoder-decoder model the attention does not count, as in this
    package's models: a time step is one source and one target token.
    """
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    left_out = {id(model.get_output_embeddings().weight)}
    left_out |= {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
    matrices = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    attention = 0
    if not config.is_encoder_decoder:
        attention = config.num_hidden_layers * config.hidden_size * (config.max_position_embeddings + 1)
    return sum(parameter.numel() for parameter in parameters), matrices + attention


def layers_without_memory(config: MoeConfig) -> torch.nn.ModuleList:
    """Return all layers of the model, without embedding and softmax, as modules on the meta device."""
    with torch.device("meta"):
        if isinstance(config, GnmtMoeConfig):
            model = GnmtMoeModel(config)
            deep_output = [model.decoder.deep_output] if config.deep_output else []
            return torch.nn.ModuleList([*model.encoder.layers, *model.decoder.layers, *deep_output])
        return LstmMoeModel(config).layers


def check_memory(config: MoeConfig, num_processes: int = 1) -> None:
    """Refuse a model whose weights alone exceed this machine's memory.

    Args:
        config: the model's configuration.
        num_processes: number of processes that share the weights.

    Raises:
        InputError: the weights are too large; the message has their size in float32 and the machine's memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Computed without tensors: the largest sizes overflow torch's counters, even on the meta device.
    values = count_embedding_parameters(config) + config.hidden_size**2
    if any("moe" in (getattr(config, f"{stack}layer_pattern", None) or []) for stack in ("", "encoder_", "decoder_")):
        values += config.num_experts * config.hidden_size * config.moe_intermediate_size
    is_lower_bound = BYTES * values > memory * num_processes
    if not is_lower_bound:
        values = count_embedding_parameters(config) + count_parameters(config)
    if BYTES * values > memory * num_processes:
        names = ("vocab_size", "hidden_size", "lstm_hidden_size", "num_experts", "moe_intermediate_size")
        sizes = ", ".join(f"{name}={value}" for name in names if (value := getattr(config, name)) is not None)
        raise InputError(
            f"{sizes}: the weights take {'at least ' * is_lower_bound}{BYTES * values / 1e9:,.0f} GB in float32, this "
            f"machine has {memory / 1e9:,.0f} GB"
        )
