"""The GNMT-MoE translation model (Shazeer et al., 2017, appendices E and G): encoder, decoder, and the softmax.

Shape suffixes: B batch, S source length, T target length, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
    Seq2SeqMoEModelOutput,
    Seq2SeqMoEOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache import CACHE_NAME, cache_of, keeps_lstm_state, one_cache
from .configuration_gnmt_moe import GnmtMoeConfig
from .configuration_moe import EXPERTS_EP_PLAN, EXPERTS_TP_PLAN, FSDP_PLAN
from .generation_moe import MoeGenerationMixin
from .gnmt_layers import AttentionLstmLayer, BidirectionalLstmLayer, DeepOutput, GnmtAttention
from .lstm import LstmLayer, row_lengths
from .moe import MoeBlock
from .pretrained_moe import MoePreTrainedModel, TokenEmbedding, padding_mask
from .softmax_loss import SoftmaxHead
from .task_loss import IGNORED, check_loss_is_ours, summed_cross_entropy


@dataclass
class GnmtMoeEncoderOutput(BaseModelOutput):
    """The library's fields, router_logits, and aux_loss (the weighted balancing losses), only if requested.

    generate() does not request them: it would repeat every tensor of this object for each beam.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class GnmtMoeDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The library's fields, router_logits, and aux_loss (the weighted balancing losses), only if requested."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class GnmtMoeModelOutput(Seq2SeqMoEModelOutput):
    """The library's fields, and `aux_loss`, the weighted balancing losses of both stacks (a scalar)."""

    aux_loss: torch.Tensor | None = None


@dataclass
class GnmtMoeSeq2SeqLMOutput(Seq2SeqMoEOutput):
    """The library's fields, and `aux_loss`, the weighted balancing losses of both stacks (a scalar)."""

    aux_loss: torch.Tensor | None = None


class GnmtMoePreTrainedModel(MoePreTrainedModel):
    """The attributes of this family for Transformers."""

    config_class = GnmtMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LstmLayer", "BidirectionalLstmLayer", "AttentionLstmLayer", "MoeBlock"]
    _can_record_outputs = MoePreTrainedModel._can_record_outputs | {
        "cross_attentions": OutputRecorder(AttentionLstmLayer, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (GnmtAttention, DeepOutput)):
            module.reset_parameters()

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # The library resizes the source embedding and the softmax, and ties the softmax again afterwards.
        decoder = self.get_decoder()
        if not self.config.share_embeddings and decoder is not self:
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


class GnmtMoeStack(GnmtMoePreTrainedModel):
    """The common base of encoder and decoder."""

    # The configuration's plans would get a wrong prefix, so the plan is here.
    _tp_plan = EXPERTS_TP_PLAN
    _ep_plan = EXPERTS_EP_PLAN
    _fsdp_plan = FSDP_PLAN


class GnmtMoeEncoder(GnmtMoeStack):
    """The encoder: embedding, a first LSTM in both directions, further LSTM and MoE layers."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(GradientCheckpointingLayer, index=0, num_hidden_layers_key="encoder_layers"),
        "router_logits": GnmtMoePreTrainedModel._can_record_outputs["router_logits"],
    }

    def __init__(self, config: GnmtMoeConfig):
        super().__init__(config)
        self.embed_tokens = TokenEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList()
        for index, name in enumerate(config.encoder_layer_pattern):
            if name == "moe":
                layer = MoeBlock(config)
            elif index == 0 and config.encoder_bidirectional_first:
                layer = BidirectionalLstmLayer(config)
            else:
                reads_both_directions = index == 1 and config.encoder_bidirectional_first
                layer = LstmLayer(config, 2 * config.hidden_size if reads_both_directions else None)
            self.layers.append(layer)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_statistics: bool = False,
        **kwargs: Any,
    ) -> GnmtMoeEncoderOutput:
        """
        Args:
            input_ids: (B, S) int64, the source.
            attention_mask: (B, S), 0 for padding on either side. Padding does not change other positions.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            output_statistics: whether to compute the gates' statistics, and the balancing losses from them.
            **kwargs: `output_hidden_states` and `output_router_logits`, whether to return them.

        Returns:
            last_hidden_state (B, S, D); its values at padding are meaningless.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, an id is outside the vocabulary,
                or the mask has another shape.
            TypeError: a keyword is not known.
        """
        self._check_keywords(kwargs)
        inputs_embeds = self._embed(input_ids, inputs_embeds, self.embed_tokens)
        mask, lengths = row_lengths(padding_mask("attention_mask", attention_mask, inputs_embeds, has_past=False))
        hidden_states = self.dropout(inputs_embeds)
        aux_loss = self._zero_aux_loss(hidden_states, output_statistics)
        both_directions = None  # the bidirectional layer's concatenated output, for an LSTM directly after it
        for index, (name, layer) in enumerate(zip(self.config.encoder_layer_pattern, self.layers)):
            if index == 0 and self.config.encoder_bidirectional_first:
                hidden_states, both_directions = layer(hidden_states, mask, lengths)
                continue
            if name == "lstm":
                hidden_states, _, _ = layer(hidden_states, mask, None, None, both_directions, lengths=lengths)
            else:
                hidden_states, aux_loss = self._run_moe(layer, hidden_states, mask, aux_loss)
            both_directions = None  # higher layers read hidden_states
        return GnmtMoeEncoderOutput(last_hidden_state=hidden_states, aux_loss=aux_loss)


class GnmtMoeDecoder(GnmtMoeStack):
    """The decoder: a first LSTM that queries the attention, further LSTM layers that read the context, MoE layers.

    With `config.deep_output`, a `DeepOutput` follows the layers.

    The state is an `EncoderDecoderCache`. Its first part has h and c of every LSTM layer; h of the first layer is the
    attention's query. Layer 0 of its second part has the attention's keys and the encoder's output.
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
        self.deep_output = None
        if config.deep_output:
            self.deep_output = DeepOutput(config)
            # Not for the whole class: accelerate's FSDP plugin refuses a name that the model does not have.
            self._no_split_modules = [*self._no_split_modules, "DeepOutput"]
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
        output_statistics: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> GnmtMoeDecoderOutput:
        """
        Args:
            inputs_embeds: (B, T, D), embeddings of the target.
            encoder_hidden_states: (B, S, D), the encoder's output.
            attention_mask: (B, T) or (B, past + T), 0 for target padding at any position. Padding does not change
                other positions.
            encoder_attention_mask: (B, S), 0 for source padding, which gets no attention.
            past_key_values: the state after earlier target tokens; updated in place.
            use_cache: whether to return the state.
            output_statistics: whether to compute the gates' statistics, and the balancing losses from them.
            cache: another name for `past_key_values`.
            **kwargs: `output_attentions`, `output_hidden_states` and `output_router_logits`, whether to return them.

        Raises:
            ValueError: a mask has another shape, or the cache is of another kind or batch size.
            TypeError: a keyword is not known.
        """
        self._check_keywords(kwargs)
        past_key_values = self._usable_cache(one_cache(past_key_values, cache), use_cache)
        mask, lengths = row_lengths(padding_mask("decoder_attention_mask", attention_mask, inputs_embeds))
        source_mask = padding_mask("attention_mask", encoder_attention_mask, encoder_hidden_states, has_past=False)
        keys, source = self._keys_and_source(past_key_values, encoder_hidden_states)
        states = self._states(past_key_values)

        hidden_states = embeddings = self.dropout(inputs_embeds)
        aux_loss = self._zero_aux_loss(hidden_states, output_statistics)
        h, c = states[0]
        # The attention weights are dropped here, because the library records them (`_can_record_outputs`).
        inputs = (hidden_states, source, keys, source_mask, mask, h, c, lengths)
        hidden_states, context, _, h, c, keys = self.layers[0](*inputs)
        states[0] = h, c
        for index, (name, layer) in list(enumerate(zip(self.config.decoder_layer_pattern, self.layers)))[1:]:
            if name == "moe":
                hidden_states, aux_loss = self._run_moe(layer, hidden_states, mask, aux_loss)
            else:
                inputs = torch.cat([hidden_states, context.to(hidden_states)], dim=-1)
                hidden_states, h, c = layer(hidden_states, mask, *states[index], inputs, lengths=lengths)
                states[index] = h, c
        if self.deep_output is not None:
            hidden_states = self.deep_output(hidden_states, embeddings, context)
        if past_key_values is not None:
            self._keep(past_key_values, states, keys, source, num_tokens=hidden_states.shape[1])
        return GnmtMoeDecoderOutput(
            last_hidden_state=hidden_states, aux_loss=aux_loss, **{CACHE_NAME: past_key_values}
        )

    def _states(self, past_key_values: EncoderDecoderCache | None) -> list[tuple[torch.Tensor | None, ...]]:
        """Return (h, c) for every layer: None for LSTMs before the first token, and always None for MoE layers."""
        if past_key_values is None:
            return [(None, None)] * len(self.layers)
        return [layer.state for layer in past_key_values.self_attention_cache.layers]

    def _keys_and_source(self, past_key_values: EncoderDecoderCache | None, encoder_hidden_states: torch.Tensor):
        """Return the attention's keys (None before the first token) and the source they are computed from."""
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

    def _new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

    def _check_cache(self, past_key_values: Cache) -> None:
        if isinstance(past_key_values, EncoderDecoderCache):
            layers = past_key_values.self_attention_cache.layers
            source = past_key_values.cross_attention_cache.layers[:1]
            if len(layers) == len(self.layers) and all(map(keeps_lstm_state, [*layers, *source])):
                return
        raise ValueError(
            f"past_key_values={past_key_values} cannot hold an LSTM state, build it with EncoderDecoderCache("
            "DynamicCache(config=model.config), DynamicCache(config=model.config))"
        )


class GnmtMoeModel(GnmtMoePreTrainedModel):
    """Encoder and decoder, without the softmax."""

    def __init__(self, config: GnmtMoeConfig):
        super().__init__(config)
        self.encoder = GnmtMoeEncoder(config)
        self.decoder = GnmtMoeDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def embed_target(self, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        """Embed (B, T) ids as (B, T, D), with the decoder's embedding, or the shared embedding in the encoder."""
        embed_tokens = self.encoder.embed_tokens if self.config.share_embeddings else self.decoder.embed_tokens
        return embed_tokens(decoder_input_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_statistics: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> GnmtMoeModelOutput:
        """
        Args:
            input_ids: (B, S) int64, the source.
            attention_mask: (B, S), 0 for source padding on either side; it changes nothing for the rest.
            decoder_input_ids: (B, T) int64, the target.
            decoder_attention_mask: (B, T) or (B, past + T), 0 for target padding, likewise.
            encoder_outputs: what the encoder gave, instead of `input_ids`.
            past_key_values: the decoder's state after earlier tokens; it is updated in place.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            decoder_inputs_embeds: (B, T, D), instead of `decoder_input_ids`.
            use_cache: whether to return the state; by default `config.use_cache`, but not while training.
            output_statistics: whether to compute the gates' statistics, and the balancing losses from them; by
                default only while training.
            cache: another name of `past_key_values`.
            **kwargs: `output_attentions`, `output_hidden_states` and `output_router_logits`, whether to return them.

        Raises:
            ValueError: not exactly one of `decoder_input_ids` and `decoder_inputs_embeds`, and what encoder and
                decoder raise.
            TypeError: a keyword that is not used.
        """
        decoder_inputs_embeds = self._embed(
            decoder_input_ids, decoder_inputs_embeds, self.embed_target, prefix="decoder_"
        )
        use_cache, output_statistics = self._with_defaults(use_cache, output_statistics)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_statistics=output_statistics,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = GnmtMoeEncoderOutput(last_hidden_state=encoder_outputs[0])
        outputs = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=attention_mask,
            past_key_values=one_cache(past_key_values, cache),
            use_cache=use_cache,
            output_statistics=output_statistics,
            **kwargs,
        )
        aux_loss = outputs.aux_loss
        if aux_loss is not None and encoder_outputs.get("aux_loss") is not None:
            aux_loss = aux_loss + encoder_outputs.aux_loss.to(aux_loss.device)
        return GnmtMoeModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_router_logits=outputs.router_logits,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_router_logits=encoder_outputs.get("router_logits"),
            aux_loss=aux_loss,
            **{CACHE_NAME: cache_of(outputs)},
        )


class GnmtMoeForConditionalGeneration(GnmtMoePreTrainedModel, MoeGenerationMixin):
    """The translation model: `GnmtMoeModel` and the softmax over the target's vocabulary."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: GnmtMoeConfig):
        super().__init__(config)
        self.model = GnmtMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = SoftmaxHead(config.hidden_size, config.vocab_size)
        if not config.share_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return decoder_input_ids (B, T) for labels (B, T): shifted right, with -100 replaced by padding.

        `decoder_start_token_id` is at the position of the first label other than -100, after any left padding.

        Raises:
            ValueError: `decoder_start_token_id` is not set.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id=None must be a token id to compute decoder_input_ids from labels")
        padding = start if self.config.pad_token_id is None else self.config.pad_token_id
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=IGNORED)
        is_first = (labels != IGNORED).int().cumsum(dim=1).eq(1) & (labels != IGNORED)
        return shifted.masked_fill(shifted == IGNORED, padding).masked_fill(is_first, start)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        output_statistics: bool | None = None,
        **kwargs: Any,
    ) -> GnmtMoeSeq2SeqLMOutput:
        """
        Args:
            input_ids: (B, S) int64, the source.
            attention_mask: (B, S), 0 for source padding on either side; it changes nothing for the rest.
            decoder_input_ids: (B, T) int64, the target; None: made from `labels` by
                `prepare_decoder_input_ids_from_labels`.
            decoder_attention_mask: (B, T) or (B, past + T), 0 for target padding; None: found by `labels`, see
                `_target_mask`. Padding is neither routed to experts nor counted, and not scored either. A label of
                -100 alone masks no input.
            encoder_outputs: what the encoder gave, instead of `input_ids`.
            past_key_values: the decoder's state after earlier tokens; it is updated in place.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            decoder_inputs_embeds: (B, T, D), instead of `decoder_input_ids`.
            labels: (B, T) int64, the token that follows each position of the decoder; -100 is not scored.
            use_cache: whether to return the state; by default `config.use_cache`, but not while training.
            logits_to_keep: compute the logits of this many last positions only (0: all), or of these positions.
            num_items_in_batch: number of scored tokens in the whole batch of an optimizer step, over all micro-batches
                and processes. The task loss is divided by it, and the balancing losses are weighed by this
                micro-batch's share of it: their gradient is the mean over the micro-batches.
            cache: another name of `past_key_values`.
            output_statistics: whether to compute the balancing losses; by default with labels, and while training.
            **kwargs: `output_attentions`, `output_hidden_states` and `output_router_logits`, whether to return them.

        Returns:
            loss: while training the task loss (with `config.label_smoothing`) plus the balancing losses, in evaluation
                the task loss alone, without smoothing (so that exp(loss) is a perplexity). aux_loss: the balancing
                losses, already weighted.

        Raises:
            ValueError: `num_items_in_batch` without labels, and what `GnmtMoeModel` raises.
        """
        check_loss_is_ours(num_items_in_batch, has_labels=labels is not None)
        if labels is not None:
            if decoder_attention_mask is None:
                decoder_attention_mask = self._target_mask(decoder_input_ids, labels)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs: GnmtMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_statistics=self._needs_statistics(output_statistics, labels is not None),
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            mask = decoder_attention_mask[:, -labels.shape[1] :].to(labels.device).bool()
            labels = labels.masked_fill(~mask, IGNORED)
            nats = summed_cross_entropy(logits, labels, self._label_smoothing)
            loss = self._loss_of_batch(nats, labels, num_items_in_batch, outputs.aux_loss)
        return GnmtMoeSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_router_logits=outputs.decoder_router_logits,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_router_logits=outputs.encoder_router_logits,
            aux_loss=outputs.aux_loss,
            **{CACHE_NAME: cache_of(outputs)},
        )

    def _target_mask(self, decoder_input_ids: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """Return (B, T) bool, False for target padding; a position that is merely not scored is not padding.

        Without `decoder_input_ids`, the positions before the first and after the last scored label are padding. With
        `decoder_input_ids`, a position is padding if its label is -100 and its input is padding or the end of a
        sentence, as collators leave them around a shorter target.
        """
        is_scored = labels != IGNORED
        if decoder_input_ids is None:
            return (is_scored.cumsum(dim=1) > 0) & (is_scored.flip(1).cumsum(dim=1).flip(1) > 0)
        ids, start = decoder_input_ids.to(labels.device), self.config.decoder_start_token_id
        ends = self.config.eos_token_id
        padding = {start if self.config.pad_token_id is None else self.config.pad_token_id}
        padding |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
        is_padding = torch.isin(ids, torch.tensor(sorted(padding - {None}), device=ids.device, dtype=ids.dtype))
        # The start token may equal the padding or the end of sentence; then real tokens follow it.
        is_start = (False if start is None else ids == start) & ~nn.functional.pad(
            is_padding[:, 1:], (0, 1), value=True
        )
        return is_scored | is_start | ~is_padding


__all__ = ["GnmtMoePreTrainedModel", "GnmtMoeModel", "GnmtMoeForConditionalGeneration"]
