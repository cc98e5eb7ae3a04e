"""The decoder of the translation model (appendix E).

Shape suffixes: B batch, S source length, T target length, D width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.output_capturing import capture_outputs

from .attention_lstm import AttentionLstmLayer
from .cache import CACHE_NAME, keeps_lstm_state, one_cache
from .configuration_gnmt_moe import GnmtMoeConfig
from .configuration_moe import FSDP_PLAN
from .embedding import TokenEmbedding
from .inputs import check_keywords, padding_mask
from .lstm import LstmLayer
from .moe import MoeBlock
from .pretrained_gnmt_moe import GnmtMoeStack


@dataclass
class GnmtMoeDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The library's fields, router_logits, and aux_loss: the weighted balancing losses, only when asked for."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class GnmtMoeDecoder(GnmtMoeStack):
    """A first LSTM that drives the attention, further LSTM layers that read its context too, and MoE layers.

    State: an `EncoderDecoderCache`. Its first part has h and c of every LSTM layer (the attention's feed is the first
    layer's h); layer 0 of its second part has the source: the attention's keys and the encoder's output.
    """

    _fsdp_plan = {"layers.*": FSDP_PLAN["layers.*"]}

    def __init__(self, config: GnmtMoeConfig):
        super().__init__(config)
        self.embed_tokens = None
        if not config.share_embeddings:
            self.embed_tokens = TokenEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([AttentionLstmLayer(config)])
        for name in config.decoder_layer_pattern[1:]:
            self.layers.append(LstmLayer(config, 2 * config.hidden_size) if name == "lstm" else MoeBlock(config))
        self.post_init()

    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_aux_loss: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> GnmtMoeDecoderOutput:
        """
        Args:
            inputs_embeds: (B, T, D), embeddings of the target.
            encoder_hidden_states: (B, S, D), the encoder's output.
            attention_mask: (B, T) or (B, past + T), 0 for target padding, anywhere; it changes nothing for the rest.
            encoder_attention_mask: (B, S), 0 for source padding, which gets no attention.
            past_key_values, or cache: the state after earlier target tokens; it is updated in place.
            use_cache: whether to return the state.
            output_aux_loss: whether to compute the balancing losses.
            output_attentions, output_hidden_states, output_router_logits (by name): whether to return them.

        Raises:
            ValueError: a mask of another shape, or a cache of another kind or batch size.
            TypeError: a keyword that is not used.
        """
        check_keywords(self, kwargs)
        past_key_values = one_cache(past_key_values, cache)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if past_key_values is not None:
            self._check_cache(past_key_values)
        mask = padding_mask("decoder_attention_mask", attention_mask, inputs_embeds)
        source_mask = padding_mask("attention_mask", encoder_attention_mask, encoder_hidden_states, has_past=False)
        keys, source = self._keys_and_source(past_key_values, encoder_hidden_states)
        states = self._states(past_key_values)

        hidden_states = self.dropout(inputs_embeds)
        aux_loss = self.no_aux_loss(hidden_states, output_aux_loss)
        h, c = states[0]
        # What is left out here are the attention weights, which the library records (`_can_record_outputs`).
        hidden_states, context, _, h, c, keys = self.layers[0](hidden_states, source, keys, source_mask, mask, h, c)
        states[0] = h, c
        for index, (name, layer) in list(enumerate(zip(self.config.decoder_layer_pattern, self.layers)))[1:]:
            if name == "moe":
                hidden_states, aux_loss = self.run_moe(layer, hidden_states, mask, aux_loss)
            else:
                inputs = torch.cat([hidden_states, context.to(hidden_states)], dim=-1)
                hidden_states, h, c = layer(hidden_states, mask, *states[index], inputs)
                states[index] = h, c
        if past_key_values is not None:
            self._keep(past_key_values, states, keys, source, num_tokens=hidden_states.shape[1])
        return GnmtMoeDecoderOutput(
            last_hidden_state=hidden_states, aux_loss=aux_loss, **{CACHE_NAME: past_key_values}
        )

    def _states(self, past_key_values: EncoderDecoderCache | None) -> list[tuple[torch.Tensor | None, ...]]:
        """(h, c) for every layer, of which an LSTM's are None before the first token, and a MoE layer's for ever."""
        if past_key_values is None:
            return [(None, None)] * len(self.layers)
        return [layer.state for layer in past_key_values.self_attention_cache.layers]

    def _keys_and_source(self, past_key_values: EncoderDecoderCache | None, encoder_hidden_states: torch.Tensor):
        """The attention's keys, None before the first token, and the source that they are computed from."""
        if past_key_values is None or not past_key_values.is_updated.get(0):
            return None, encoder_hidden_states
        return past_key_values.cross_attention_cache.layers[0].state

    def _keep(self, past_key_values: EncoderDecoderCache, states, keys, source, num_tokens: int) -> None:
        for index, (h, c) in enumerate(states):
            if h is not None:
                past_key_values.self_attention_cache.update(h, c, index, num_tokens=num_tokens)
        if not past_key_values.is_updated.get(0):
            past_key_values.cross_attention_cache.update(keys, source, 0, num_tokens=source.shape[1])
            past_key_values.is_updated[0] = True

    def _check_cache(self, past_key_values: Cache) -> None:
        if isinstance(past_key_values, EncoderDecoderCache):
            layers = past_key_values.self_attention_cache.layers
            source = past_key_values.cross_attention_cache.layers[:1]
            if len(layers) == len(self.layers) and all(map(keeps_lstm_state, [*layers, *source])):
                return
        raise ValueError(
            f"past_key_values={past_key_values} keeps no LSTM state, build it with EncoderDecoderCache("
            "DynamicCache(config=model.config), DynamicCache(config=model.config))"
        )
