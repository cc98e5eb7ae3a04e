"""Checks a model once, while it is loaded, before it is sharded over processes."""

import torch
import transformers
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import PreTrainedModel

from .experts import MoeExperts


def check_sharding(model: PreTrainedModel, distributed_config: DistributedConfig) -> None:
    """Refuse, on every process, a model that cannot be sharded as requested.

    Args:
        model: a model with whole parameters, on the meta device.
        distributed_config: how many processes share the experts.

    Raises:
        ValueError: `ep_size` does not fit the experts, or the processes' configurations or libraries differ.
    """
    config, size = model.config, distributed_config.ep_size
    values = config.to_dict()
    values.pop("_name_or_path", None)  # each process may read its own copy
    check_same_everywhere(values)
    if size == 1:
        return
    if not any(isinstance(module, MoeExperts) for module in model.modules()):
        raise ValueError(f"ep_size={size} shards experts, but the model has no 'moe' layer; use ep_size=1")
    if config.num_experts % size:
        raise ValueError(f"ep_size={size} must divide num_experts={config.num_experts}")
    if config.num_expert_layers > 1:
        # The library's plans cut the first dimension, which is the layer in mid_proj.
        raise ValueError(f"ep_size={size} needs num_expert_layers=1, not {config.num_expert_layers}; use ep_size=1")


def check_same_everywhere(values: dict) -> None:
    """Refuse, on every process, values or library versions that differ between processes.

    Processes with different shapes, or another order of collectives, would wait for each other forever.

    Args:
        values: {name: value}, compared by their `repr`.

    Raises:
        ValueError: a value or a version differs.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    everywhere = [None] * torch.distributed.get_world_size()
    own = {name: repr(value) for name, value in (values | versions).items()}
    torch.distributed.all_gather_object(everywhere, own)
    for rank, other in enumerate(everywhere):
        for name in sorted(everywhere[0].keys() | other.keys()):
            value, expected = other.get(name, "not given"), everywhere[0].get(name, "not given")
            if value != expected:
                raise ValueError(f"{name}={value} on process {rank} differs from {name}={expected} on process 0")
