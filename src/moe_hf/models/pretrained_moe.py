"""What both model families share as Transformers models: initialisation, loading, recording, the experts' backend."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .balanced_gating import StrictlyBalancedGate
from .experts import MoeExperts
from .experts_interface import OWN_IMPLEMENTATION
from .gating import NoisyTopKGate, SoftmaxTopKGate
from .hierarchical_gating import HierarchicalGate
from .lstm import Lstm
from .quantization import int8_quantization
from .sharding_checks import check_sharding


class MoePreTrainedModel(PreTrainedModel):
    """Base class of both families; `config` is a `MoeConfig`."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _is_stateful = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(GradientCheckpointingLayer, index=0),
        # A HierarchicalGate is recorded through its primary gate, which is a NoisyTopKGate: logits over the groups.
        "router_logits": [
            OutputRecorder(gate_class, index=2)
            for gate_class in (NoisyTopKGate, SoftmaxTopKGate, StrictlyBalancedGate)
        ],
    }

    def __init__(self, config, *args, **kwargs):
        if getattr(config, "quantization_config", None) is not None:
            int8_quantization(config.quantization_config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the library's, and refuses a `quantization_config` that would change nothing, before weights are read.

        Raises:
            ValueError: `quantization_config`, given or the folder's, is none that `int8_quantization` takes.
        """
        folder_config = getattr(kwargs.get("config"), "quantization_config", None)
        if folder_config is not None:
            int8_quantization(folder_config)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = int8_quantization(kwargs["quantization_config"])
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Embedding, nn.Linear)):
            std = self.config.initializer_range
            init.normal_(module.weight, std=self.config.hidden_size**-0.5 if std is None else std)
        elif isinstance(module, (Lstm, MoeExperts, StrictlyBalancedGate)):
            module.reset_parameters()
        elif isinstance(module, (NoisyTopKGate, SoftmaxTopKGate, HierarchicalGate)):
            for weight in module.parameters():
                init.zeros_(weight)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library looks for `@use_experts_implementation` in this file; it stands in experts.py.
        return True

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Refuse a checkpoint without thresholds, where the library only warns (`from_pretrained` calls this)."""
        names = [
            f"{name}.threshold" for name, module in self.named_modules() if isinstance(module, StrictlyBalancedGate)
        ]
        missing = [name for name in names if name in loading_info.missing_keys]
        if missing:
            raise ValueError(
                f"{missing[0]} is missing from the checkpoint, and gating='strictly_balanced' cannot choose experts "
                "without trained thresholds: load the checkpoint with the gating that it was trained with, or, to "
                "train thresholds for its weights, build a new model and call load_state_dict(..., strict=False)"
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """Shard a model on the meta device; refuses what the library would shard wrongly, or wait for without end."""
        if mesh_manager is not None:
            check_sharding(model, distributed_config)
            if model.all_tied_weights_keys and distributed_config.tp_size == 1:
                # One weight in one group. The library shards embedding and softmax before it ties them, and in two
                # groups: where the processes do not divide the vocabulary each then has a padded copy, and one of
                # them is never updated.
                model.tie_weights(recompute_mapping=False)
                model.fsdp_plan = {name: rule for name, rule in model.fsdp_plan.items() if name != "lm_head"}
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        state_dict = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )
        if getattr(self, "is_quantized", False):
            # The library cannot undo the conversions that it loads quantized weights by, and saves tied ones twice.
            self._weight_conversions = None
            tied = tuple("._".join(name.rsplit(".", 1)) + "_" for name in self.all_tied_weights_keys)
            return {name: part for name, part in state_dict.items() if not name.startswith(tied)}
        if distributed_config is None:
            return state_dict
        # Gathered, tied weights are tensors of their own, which the library takes for different ones.
        return {name: weight for name, weight in state_dict.items() if name not in self.all_tied_weights_keys}

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        config, reason = self.config, None
        if getattr(config, "quantization_config", None) is not None and requested_experts != OWN_IMPLEMENTATION:
            reason = "computes with float weights, but the model is quantized"
        elif config.num_expert_layers > 1:
            reason = f"computes one hidden layer, but num_expert_layers={config.num_expert_layers}"
        elif requested_experts in (None, OWN_IMPLEMENTATION) and config.hidden_act != "relu":
            reason = f"computes ReLU units, but hidden_act={config.hidden_act!r}"
        elif requested_experts == "grouped_mm":
            for name in ("hidden_size", "moe_intermediate_size"):
                if getattr(config, name) % 8:
                    reason = f"needs multiples of 8, but {name}={getattr(config, name)}"
        if reason is not None:
            if requested_experts not in (None, "eager"):
                raise ValueError(f"experts_implementation={requested_experts!r} {reason}; use 'eager'")
            return "eager"
        return super().get_correct_experts_implementation(requested_experts or OWN_IMPLEMENTATION)
