"""Stores the state of an LSTM as a layer of a Transformers cache."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

# The library's name for the cache in a model's outputs and inputs: "cache" from version 5.24 on.
CACHE_NAME = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache that a forward got under either name.

    Raises:
        ValueError: the names have different caches.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give only one of them")
    return cache if past_key_values is None else past_key_values


def cache_of(outputs) -> Cache | None:
    """Return the cache in the outputs of a model, of `generate()`, or of a generation step."""
    return outputs.get(CACHE_NAME)


class LstmCacheLayer(CacheLayerMixin):
    """Output h and cell c of one LSTM layer after the tokens seen so far. The size does not depend on their number.

    `keys` holds h (B, D) and `values` holds c (B, units), so that the library's beam reordering works. The class is
    registered as layer type "lstm". `DynamicCache(config=model.config)` builds one such layer for each model layer;
    those of MoE layers stay empty. The translation model's decoder stores two other tensors in one such layer, which
    are reordered in the same way: the attention's keys and the source.
    """

    _layer_type = "lstm"
    is_sliding = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._count_from_zero()

    def _count_from_zero(self) -> None:
        # A tensor, because an exported step treats a cache's tensors as inputs, and other values as constants.
        self.cumulative_length = torch.zeros((), dtype=torch.long, device="cpu")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def state(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (h, c), or the other two tensors given to `update`; both None before the first update."""
        return self.keys, self.values

    @property
    def batch_size(self) -> int:
        return -1 if self.keys is None else self.keys.shape[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_tokens: int = 1, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the state after `num_tokens` more positions (including padding, as the library counts them)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.cumulative_length = self.cumulative_length + num_tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.cumulative_length) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def detach(self) -> None:
        """Detach the state from its gradient history (truncated back-propagation through time)."""
        if self.is_initialized:
            self.keys, self.values = self.keys.detach(), self.values.detach()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._count_from_zero()

    def offload(self) -> None:
        """Do nothing: the state is small, and a forward pass reads it before the cache could bring it back."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: an LSTM's state cannot go back, only 0 is allowed")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]


class StaticLstmCacheLayer(LstmCacheLayer, StaticLayer):
    """A `LstmCacheLayer` whose tensors keep their addresses, so that a step can be compiled or be a CUDA graph.

    `StaticCache(config=model.config, max_cache_len=...)` builds one for each layer, because the library registers
    every subclass of its `StaticLayer`. The state has a fixed size, so `max_cache_len` has no effect. The state is
    overwritten in place, so a gradient cannot flow through more than one call.
    """

    @property
    def state(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (self.keys, self.values) if self.is_initialized else (None, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.keys is not None and self.keys.shape == key_states.shape:
            return  # after `reset`
        self.keys, self.values = torch.empty_like(key_states), torch.empty_like(value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_tokens: int = 1, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.cumulative_length.add_(num_tokens)
        return self.keys, self.values

    def reset(self) -> None:
        self.is_initialized = False
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            beam_idx = beam_idx.to(self.keys.device)
            self.keys.copy_(self.keys.index_select(0, beam_idx))
            self.values.copy_(self.values.index_select(0, beam_idx))


def keeps_lstm_state(layer: CacheLayerMixin) -> bool:
    """Return whether a cache's layer is a `LstmCacheLayer`.

    Compares `_layer_type`, not the class: a model loaded with trust_remote_code defines its own copy of the class, and
    the library builds the layers of the class that was defined last.
    """
    return getattr(layer, "_layer_type", None) == LstmCacheLayer._layer_type
