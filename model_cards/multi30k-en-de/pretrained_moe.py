"""The base class of both model families: checks of inputs, the run of a MoE layer, and Transformers' hooks.

Shape suffixes: B batch, S sequence, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .balanced_gating import StrictlyBalancedGate
from .configuration_moe import MoeConfig
from .experts import MoeExperts
from .experts_choice import OWN_IMPLEMENTATION, TRITON_IMPLEMENTATION, has_triton, why_only_eager
from .finite import NonFiniteWeightsError, first_non_finite
from .gating import NoisyTopKGate, SoftmaxTopKGate
from .hierarchical_gating import HierarchicalGate
from .host_reads import host_reads_are_free
from .lstm import Lstm
from .moe import MoeBlock, layer_balancing_loss
from .quantization import embedding, int8_quantization
from .sharding_checks import check_sharding
from .task_loss import loss_of_batch

GATES = (NoisyTopKGate, SoftmaxTopKGate, HierarchicalGate, StrictlyBalancedGate)
# Keywords that the library's `capture_outputs` reads around forwards that record outputs.
RECORDING_KEYWORDS = ("output_hidden_states", "output_router_logits", "output_attentions")


class TokenEmbedding(nn.Embedding):
    """ids (...) -> (..., D): rows of `weight` (vocab_size, D), times D ** 0.5 with `config.scale_embedding`.

    An embedding that is tied to the softmax must start small, with a variance of 1 / D. Gates and attention scores
    start near zero, and would learn slowly from such small inputs.

    Args:
        config: has vocab_size, hidden_size D and scale_embedding.
    """

    def __init__(self, config: MoeConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        # The library uses this name in other models, and adapters on an embedding look for it.
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embedding(input_ids, self.weight) * self.embed_scale


def check_ids(name: str, ids: torch.Tensor, vocab_size: int, may_wait: bool = False) -> None:
    """Refuse an id outside the vocabulary, which would crash the whole process on a GPU.

    The ids of a sequence on a GPU are checked there, without a host read. A wrong id still ends the process, but with
    this message.

    Args:
        name: the argument's name in the error message.
        ids: integers of any shape.
        vocab_size: the number of tokens.
        may_wait: whether to read ids from a GPU anyway.

    Raises:
        ValueError: an id is negative, or is not below `vocab_size`.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.device.type == "meta":
        return
    if not (may_wait or host_reads_are_free(ids.device)):
        if ids.device.type == "cuda" and ids.shape[-1] > 1:
            allowed = f"{name} holds an id that is not allowed: 0 to vocab_size - 1 = {vocab_size - 1}"
            torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), allowed)
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds {low if low < 0 else high}, allowed are 0 to vocab_size - 1 = {vocab_size - 1}"
        )


def padding_mask(
    name: str, mask: torch.Tensor | None, hidden_states: torch.Tensor, has_past: bool = True
) -> torch.Tensor | None:
    """Return a mask (B, S) bool for the positions of `hidden_states` (B, S, D), or None without padding.

    On a device, a mask without padding is kept, because recognising it would need a host read.

    Args:
        name: the argument's name in the error message.
        mask: (B, S), 0 for padding. With `has_past`, it may be longer, and its last S positions count. None: no
            padding.
        hidden_states: (B, S, D).
        has_past: whether the mask may include positions before those of `hidden_states`.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask is None:
        return None
    batch, length = hidden_states.shape[:2]
    fits = mask.dim() == 2 and mask.shape[0] == batch
    if not fits or mask.shape[1] < length or (mask.shape[1] > length and not has_past):
        expected = f"({batch}, {length} or more)" if has_past else f"({batch}, {length})"
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
    mask = mask[:, mask.shape[1] - length :].to(hidden_states.device, torch.bool)
    # A compiled or exported graph must also work with every mask.
    return None if host_reads_are_free(mask.device) and mask.all() else mask


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
        """Load a model as the library does, but refuse a `quantization_config` that would have no effect.

        Raises:
            ValueError: `int8_quantization` refuses the given `quantization_config`, or the folder's.
        """
        folder_config = getattr(kwargs.get("config"), "quantization_config", None)
        if folder_config is not None:
            int8_quantization(folder_config)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = int8_quantization(kwargs["quantization_config"])
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """Save a model as the library does, but refuse weights with NaN or infinity before writing anything.

        Raises:
            ValueError: a weight is not finite. Every process with a part of the model raises this error.
        """
        name = first_non_finite(self._weights_to_save(state_dict))
        if getattr(self, "is_distributed_loading_by_transformers", False):
            names = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(names, name)
            name = next(filter(None, names), None)
        if name is not None:
            raise NonFiniteWeightsError(f"{name} holds NaN or infinity; the model is not saved in {save_directory}")
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _weights_to_save(self, state_dict: dict[str, torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights with their names; read weights that are offloaded to a disk."""
        is_offloaded = hasattr(self, "hf_device_map")
        for name, weight in (self.state_dict() if state_dict is None else state_dict).items():
            yield name, load_offloaded_parameter(self, name) if is_offloaded and weight.is_meta else weight

    def _check_keywords(self, keywords: dict) -> None:
        """Refuse a keyword that no part of the model uses.

        The forwards take `**kwargs` only for `RECORDING_KEYWORDS`, and pass them to the part that records.

        Raises:
            TypeError: a keyword is not known; the message is the same as Python's.
        """
        for name in keywords:
            if name not in RECORDING_KEYWORDS:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")

    def _embed(
        self,
        ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        embed_tokens: Callable[[torch.Tensor], torch.Tensor],
        prefix: str = "",
    ) -> torch.Tensor:
        """Return the embedded input, (B, S, D).

        Args:
            ids: (B, S) token ids, or None.
            embeds: (B, S, D), instead of `ids`; returned unchanged.
            embed_tokens: function that embeds the ids.
            prefix: prefix of the names input_ids and inputs_embeds in errors.

        Raises:
            ValueError: both or neither of `ids` and `embeds` are given, or an id is outside the vocabulary.
        """
        if (ids is None) == (embeds is None):
            raise ValueError(f"exactly one of {prefix}input_ids and {prefix}inputs_embeds must be given")
        if embeds is not None:
            return embeds
        check_ids(f"{prefix}input_ids", ids, self.config.vocab_size)
        return embed_tokens(ids)

    def _with_defaults(self, use_cache: bool | None, output_statistics: bool | None) -> tuple[bool, bool]:
        """Return both arguments; by default, return a cache outside of training, and balancing losses in training."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return use_cache, self.training if output_statistics is None else output_statistics

    def _needs_statistics(self, output_statistics: bool | None, has_labels: bool) -> bool:
        """Return the given value; by default, whether there are labels or the model is training."""
        return has_labels or self.training if output_statistics is None else output_statistics

    def _usable_cache(self, past_key_values: Cache | None, use_cache: bool) -> Cache | None:
        """Return the given cache, a new cache if one is to be returned, or None.

        Raises:
            ValueError: the given cache cannot hold the state of this model's LSTMs.
        """
        if past_key_values is None:
            return self._new_cache() if use_cache else None
        self._check_cache(past_key_values)
        return past_key_values

    def _zero_aux_loss(self, hidden_states: torch.Tensor, output_statistics: bool) -> torch.Tensor | None:
        """Return zero, to which the layers' balancing losses are added, or None if they are not requested."""
        return hidden_states.new_zeros((), dtype=torch.float32) if output_statistics else None

    def _run_moe(
        self, layer: MoeBlock, hidden_states: torch.Tensor, mask: torch.Tensor | None, aux_loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a MoE layer, and add its balancing losses to `aux_loss` unless that is None."""
        hidden_states, importance, load, _, threshold_loss = layer(hidden_states, mask, aux_loss is not None)
        if aux_loss is not None:
            layer_loss = layer_balancing_loss(self.config, importance, load, threshold_loss)
            aux_loss = aux_loss.to(layer_loss.device) + layer_loss
        return hidden_states, aux_loss

    @property
    def _label_smoothing(self) -> float:
        """Return `config.label_smoothing` while training, otherwise 0."""
        return self.config.label_smoothing if self.training else 0.0

    def _loss_of_batch(
        self,
        total: torch.Tensor,
        targets: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        aux_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `loss_of_batch`, with balancing losses only in training, so that exp(eval_loss) is a perplexity."""
        return loss_of_batch(total, targets, num_items_in_batch, aux_loss if self.training else None)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Embedding, nn.Linear)):
            std = self.config.initializer_range
            init.normal_(module.weight, std=self.config.hidden_size**-0.5 if std is None else std)
        elif isinstance(module, (Lstm, MoeExperts, *GATES)):
            module.reset_parameters()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library looks for `@use_experts_implementation` in this file, but the decorator is in experts.py.
        return True

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Refuse a checkpoint without thresholds, where the library only warns (`from_pretrained` calls it)."""
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
        """Shard a model on the meta device; refuse models that the library would shard wrongly, or hang on."""
        if mesh_manager is not None:
            check_sharding(model, distributed_config)
            if model.all_tied_weights_keys and distributed_config.tp_size == 1:
                # Ties embedding and softmax before sharding. The library would shard them in two groups and tie them
                # later. If the processes do not divide the vocabulary, each group then has a padded copy, and one copy
                # is never updated.
                model.tie_weights(recompute_mapping=False)
                model.fsdp_plan = {name: rule for name, rule in model.fsdp_plan.items() if name != "lm_head"}
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        state_dict = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )
        if getattr(self, "is_quantized", False):
            # The library cannot undo the conversions of quantized weights, and would save tied weights twice.
            self._weight_conversions = None
            tied = tuple("._".join(name.rsplit(".", 1)) + "_" for name in self.all_tied_weights_keys)
            return {name: part for name, part in state_dict.items() if not name.startswith(tied)}
        if distributed_config is None:
            return state_dict
        # Gathered copies of tied weights are separate tensors, which the library would treat as different weights.
        return {name: weight for name, weight in state_dict.items() if name not in self.all_tied_weights_keys}

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if getattr(self.config, "quantization_config", None) is not None and requested_experts == OWN_IMPLEMENTATION:
            requested_experts = None  # a quantized model may be saved with this name, and computes with "eager"
        reason = why_only_eager(self.config, requested_experts)
        if reason is not None:
            if requested_experts not in (None, "eager"):
                raise ValueError(f"experts_implementation={requested_experts!r} {reason}; use 'eager'")
            return "eager"
        if requested_experts == TRITON_IMPLEMENTATION and not has_triton():
            raise ValueError(
                f"experts_implementation={requested_experts!r} needs the package triton, which is not installed "
                f"(pip install triton); use {OWN_IMPLEMENTATION!r}"
            )
        return super().get_correct_experts_implementation(requested_experts or OWN_IMPLEMENTATION)
