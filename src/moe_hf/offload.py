"""Where the weights of a model that does not fit are kept: a device map for `from_pretrained`."""

import torch
from torch import nn

from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_moe import MoeConfig
from .models.experts import MoeExperts
from .models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration
from .models.modeling_lstm_moe import LstmMoeForCausalLM

Device = str | int


def experts_device_map(config: MoeConfig, experts: Device = "disk", rest: Device = "cpu") -> dict[str, Device]:
    """A device map that puts the experts, nearly all of a large model and each token's smallest part, on one device.

    `device_map="auto"` fills the devices in the order of the layers and keeps as much room as the largest MoE layer
    needs. It therefore sends dense layers to the disk too, or all of them, if `max_memory` is below that room.

    ```python
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=experts_device_map(config))
    ```

    Args:
        config: of either family.
        experts: "cpu", "disk", or a device of torch; on "cpu" or "disk" they are computed on `rest`.
        rest: "cpu" or a device of torch, for all other weights.
    """
    model_class = GnmtMoeForConditionalGeneration if isinstance(config, GnmtMoeConfig) else LstmMoeForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    return dict(_places("", model, experts, rest))


def _places(name: str, module: nn.Module, experts: Device, rest: Device):
    """(name, device) of the largest modules that are on one device."""
    if isinstance(module, MoeExperts):
        yield name, experts
    elif not any(isinstance(part, MoeExperts) for part in module.modules()):
        yield name, rest
    else:
        for child_name, child in module.named_children():
            yield from _places(f"{name}.{child_name}".lstrip("."), child, experts, rest)
