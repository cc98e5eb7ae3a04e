"""A device map for `from_pretrained`, to run a model that is larger than memory."""

import torch
from torch import nn

from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_moe import MoeConfig
from .models.experts import MoeExperts
from .models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration
from .models.modeling_lstm_moe import LstmMoeForCausalLM

Device = str | int


def experts_device_map(config: MoeConfig, experts: Device = "disk", rest: Device = "cpu") -> dict[str, Device]:
    """Return a device map that puts all experts on one device, and the rest of the model on another.

    The experts are nearly all of a large model's weights, but a token uses only a few of them. `device_map="auto"`
    fills the devices in the order of the layers, and reserves memory for the largest MoE layer. It therefore sends
    dense layers to the disk too: all of them, if `max_memory` is smaller than that layer.

    ```python
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=experts_device_map(config))
    ```

    Args:
        config: a configuration of either family.
        experts: "cpu", "disk", or a torch device for the experts' weights. Experts on "cpu" or "disk" are computed on
            `rest`.
        rest: "cpu" or a torch device, for all other weights.
    """
    model_class = GnmtMoeForConditionalGeneration if isinstance(config, GnmtMoeConfig) else LstmMoeForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    return dict(_places("", model, experts, rest))


def _places(name: str, module: nn.Module, experts: Device, rest: Device):
    """Yield (name, device) of the largest modules whose weights are all on one device."""
    if isinstance(module, MoeExperts):
        yield name, experts
    elif not any(isinstance(part, MoeExperts) for part in module.modules()):
        yield name, rest
    else:
        for child_name, child in module.named_children():
            yield from _places(f"{name}.{child_name}".lstrip("."), child, experts, rest)
