"""Weights of 8 bits: the only supported `quantization_config`, and products with such weights.

torchao's `Int8Tensor` stores a weight as `qdata` (..., N, K) int8 and `scale` (..., N, 1) float32, with one scale per
row. torchao does not have kernels for LSTMs and stacked experts, so this file computes with the two parts. This file
never imports torchao, because a model without quantization does not need it.

Shape suffixes: R rows of the input, N outputs, K inputs.
"""

from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig

# The parameters to quantize, as torchao's regular expressions: the matrices of experts, LSTMs and attention, and on
# request embedding and softmax. Gates are not quantized: they are small, and they choose the experts.
LAYERS = r"re:.*\.(up_proj|mid_proj|down_proj|weight_ih|weight_hh|weight_hr|source_weight|query_weight)"
EMBEDDINGS = r"re:(.*\.)?(embed_tokens|lm_head)\.weight"

_ADVICE = (
    "use TorchAoConfig(Int8WeightOnlyConfig()), include_input_output_embeddings=True for embedding and softmax too"
)
# Measured with one thread of a CPU with AVX-512: below this size, or above this many rows, a float copy is faster.
_PACKED_MIN_SIZE, _PACKED_MAX_ROWS = 2**17, 16
_FLOAT_PART_SIZE = 2**20


def int8_quantization(quantization_config: Any) -> TorchAoConfig:
    """Return the configuration that quantizes these models, from a configuration for weights of 8 bits.

    Args:
        quantization_config: a `TorchAoConfig` of an `Int8WeightOnlyConfig` with one scale per row, or a result of this
            function; each may also be a dictionary.

    Raises:
        ValueError: the configuration is another one, which would have no effect: the libraries only quantize linear
            layers.
    """
    is_dict = isinstance(quantization_config, dict)
    values = quantization_config if is_dict else quantization_config.to_dict()
    if values.get("quant_method") != "torchao":
        seen = quantization_config if is_dict else f"{type(quantization_config).__name__}(...)"
        raise ValueError(f"quantization_config={seen} does not change the weights of these models: {_ADVICE}")
    quant_type = values["quant_type"]["default"]
    configs = {LAYERS: quant_type}
    if quant_type["_type"] == "FqnToConfig":
        configs = quant_type["_data"]["fqn_to_config"]
    elif values.get("include_input_output_embeddings"):
        configs[EMBEDDINGS] = quant_type
    if not {LAYERS} <= set(configs) <= {LAYERS, EMBEDDINGS} or not all(map(_is_int8_by_row, configs.values())):
        raise ValueError(f"quantization_config=TorchAoConfig({_short(quant_type)}) is not supported: {_ADVICE}")
    configs = {name: _without_side_effects(config) for name, config in configs.items()}
    by_name = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": configs, "module_fqn_to_config": {}}}
    return TorchAoConfig.from_dict(
        {
            "quant_type": {"default": by_name},
            # Named explicitly; otherwise the library would skip the last parameter and tied weights.
            "modules_to_not_convert": values.get("modules_to_not_convert") or [],
        }
    )


def _is_int8_by_row(config: dict) -> bool:
    if config["_type"] != "Int8WeightOnlyConfig":
        return False
    granularity = config["_data"]["granularity"]
    return granularity["_type"] == "PerRow" and granularity["_data"]["dim"] == -1


def _without_side_effects(config: dict) -> dict:
    """Return the configuration changed so that torchao does not modify torch's global settings."""
    return {**config, "_data": {**config["_data"], "set_inductor_config": False}}


def _short(config: dict) -> str:
    """Return a short form, such as `Int8WeightOnlyConfig(granularity=PerGroup(group_size=32))`."""
    granularity = config["_data"].get("granularity")
    if not isinstance(granularity, dict):
        return f"{config['_type']}()"
    sizes = ", ".join(f"{name}={value}" for name, value in granularity["_data"].items())
    return f"{config['_type']}(granularity={granularity['_type']}({sizes}))"


def is_int8(*weights: torch.Tensor | None) -> bool:
    """Return whether one of these weights is quantized."""
    for weight in weights:  # a loop, because `any` would take noticeable time in one-row steps
        if hasattr(weight, "qdata"):
            return True
    return False


def dequantized(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a quantized weight in floating point, and other weights unchanged."""
    return weight.qdata.to(dtype).mul_(weight.scale) if is_int8(weight) else weight


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute `nn.functional.embedding`: ids (...) -> (..., K), rows of a weight (N, K) that may be quantized."""
    if not is_int8(weight):
        return nn.functional.embedding(ids, weight)
    return (weight.qdata[ids] * weight.scale[ids]).to(weight.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `nn.functional.linear` with a weight that may be quantized.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (..., N). x and bias get gradients; a quantized weight does not.
    """
    if not hasattr(weight, "qdata"):
        return nn.functional.linear(x, weight, bias)
    return int8_linear(x, weight.qdata, weight.scale, bias)


def expert_linear(x: torch.Tensor, weight: torch.Tensor, expert: int | tuple[int, int]) -> torch.Tensor:
    """Compute `linear` with one matrix of a stack (E, N, K), without reading the others."""
    if not hasattr(weight, "qdata"):
        return nn.functional.linear(x, weight[expert])
    return int8_linear(x, weight.qdata[expert], weight.scale[expert])


def int8_linear(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W' + bias with W = scale * qdata. The scales multiply the result, which is smaller than the weight.

    Few rows use torch's kernel for bfloat16 inputs, which reads the 8-bit values of a large weight directly.
    """
    scale_N = scale.view(-1)
    if _is_faster_packed(x, qdata):
        # Ones, because the kernel would round the true scales to bfloat16.
        ones_N = torch.ones_like(scale_N, dtype=torch.bfloat16)
        rows_RK = x.reshape(-1, x.shape[-1]).bfloat16()
        output = torch.ops.aten._weight_int8pack_mm(rows_RK, qdata, ones_N).to(x.dtype)
        output = output.view(*x.shape[:-1], len(qdata))
    elif qdata.numel() <= _FLOAT_PART_SIZE:
        output = nn.functional.linear(x, qdata.to(x.dtype))
    else:
        # In parts, so that the float copies fit into the cache.
        parts = qdata.split(max(1, _FLOAT_PART_SIZE // qdata.shape[1]))
        output = torch.cat([nn.functional.linear(x, part.to(x.dtype)) for part in parts], dim=-1)
    output = output.mul_(scale_N)
    return output if bias is None else output + bias.to(output.dtype)


def _is_faster_packed(x: torch.Tensor, qdata: torch.Tensor) -> bool:
    return (
        qdata.numel() >= _PACKED_MIN_SIZE
        and qdata.shape[1] % 32
        == 0  # torch's kernel reads whole vectors, and beyond the end of shorter rows (torch 2.13)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() <= _PACKED_MAX_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and x.requires_grad)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # on other CPUs, the kernel is a plain loop
    )
