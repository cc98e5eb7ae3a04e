"""The GNMT-MoE translation model (Shazeer et al., 2017, appendices E and G).

Shape suffixes: B batch, S source length, T target length, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput, Seq2SeqMoEModelOutput, Seq2SeqMoEOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME, cache_of, one_cache
from .configuration_gnmt_moe import GnmtMoeConfig
from .generation_moe import MoeGenerationMixin
from .gnmt_decoder import GnmtMoeDecoder
from .gnmt_encoder import GnmtMoeEncoder, GnmtMoeEncoderOutput
from .inputs import check_ids
from .pretrained_gnmt_moe import GnmtMoePreTrainedModel
from .softmax_loss import SoftmaxHead
from .task_loss import IGNORED, check_loss_is_ours, loss_of_batch, summed_cross_entropy


@dataclass
class GnmtMoeModelOutput(Seq2SeqMoEModelOutput):
    """The library's fields, and `aux_loss`, the weighted balancing losses of both stacks (a scalar)."""

    aux_loss: torch.Tensor | None = None


@dataclass
class GnmtMoeSeq2SeqLMOutput(Seq2SeqMoEOutput):
    """The library's fields, and `aux_loss`, the weighted balancing losses of both stacks (a scalar)."""

    aux_loss: torch.Tensor | None = None


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
        """(B, T) -> (B, T, D), by the decoder's own embedding, or by the shared one, which stands in the encoder."""
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
        output_aux_loss: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> GnmtMoeModelOutput:
        """
        Args:
            input_ids: (B, S), the source, or `inputs_embeds`: (B, S, D), or `encoder_outputs`: what the encoder gave.
            attention_mask: (B, S), 0 for source padding on either side; it changes nothing for the rest.
            decoder_input_ids: (B, T), the target, or `decoder_inputs_embeds`: (B, T, D).
            decoder_attention_mask: (B, T) or (B, past + T), 0 for target padding, likewise.
            past_key_values, or cache: the decoder's state after earlier tokens; it is updated in place.
            use_cache: whether to return the state; by default `config.use_cache`, but not while training.
            output_aux_loss: whether to compute the balancing losses; by default only while training.
            output_attentions, output_hidden_states, output_router_logits (by name): whether to return them.

        Raises:
            ValueError: not exactly one of `decoder_input_ids` and `decoder_inputs_embeds`, and what encoder and
                decoder raise.
            TypeError: a keyword that is not used.
        """
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("exactly one of decoder_input_ids and decoder_inputs_embeds must be given")
        if decoder_inputs_embeds is None:
            check_ids("decoder_input_ids", decoder_input_ids, self.config.vocab_size)
            decoder_inputs_embeds = self.embed_target(decoder_input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_aux_loss is None:
            output_aux_loss = self.training
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_aux_loss=output_aux_loss,
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
            output_aux_loss=output_aux_loss,
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
        """(B, T) labels -> (B, T) decoder_input_ids: shifted right behind `decoder_start_token_id`, -100 as padding.

        The start token stands where the first label is not -100, so under left padding after the padding.

        Raises:
            ValueError: `decoder_start_token_id` is not set.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id=None must be a token, to make decoder_input_ids from labels")
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
        **kwargs,
    ) -> GnmtMoeSeq2SeqLMOutput:
        """
        Args:
            input_ids, attention_mask, encoder_outputs, past_key_values, use_cache, cache and the rest: see
                `GnmtMoeModel`.
            labels: (B, T), the token that follows each position of the decoder; -100 is not scored.
            decoder_input_ids: made from `labels` by `prepare_decoder_input_ids_from_labels` when left out.
            decoder_attention_mask: when left out, target padding is found by `labels`, see `_target_mask`. Padding is
                neither routed to experts nor counted, and not scored either. A label of -100 alone masks no input.
            logits_to_keep: compute the logits of this many last positions only (0: all), or of these positions.
            num_items_in_batch: number of scored tokens in the whole batch of an optimizer step, over all micro-batches
                and processes. The task loss is divided by it, and the balancing losses are weighed by this
                micro-batch's share of it: their gradient is the mean over the micro-batches.

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
            output_aux_loss=labels is not None or self.training,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            mask = decoder_attention_mask[:, -labels.shape[1] :].to(labels.device).bool()
            labels = labels.masked_fill(~mask, IGNORED)
            nats = summed_cross_entropy(logits, labels, self.config.label_smoothing if self.training else 0.0)
            loss = loss_of_batch(nats, labels, num_items_in_batch, outputs.aux_loss if self.training else None)
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
        """(B, T) bool, False for target padding: never for a position that is only not scored.

        Of labels alone, the positions before the first and after the last one that is scored are padding. With
        `decoder_input_ids` padding is a position with label -100 which reads padding or an end of sentence, as
        collators leave them around a shorter target.
        """
        is_scored = labels != IGNORED
        if decoder_input_ids is None:
            return (is_scored.cumsum(dim=1) > 0) & (is_scored.flip(1).cumsum(dim=1).flip(1) > 0)
        ids, start = decoder_input_ids.to(labels.device), self.config.decoder_start_token_id
        ends = self.config.eos_token_id
        padding = {start if self.config.pad_token_id is None else self.config.pad_token_id}
        padding |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
        is_padding = torch.isin(ids, torch.tensor(sorted(padding - {None}), device=ids.device, dtype=ids.dtype))
        # A start token may be the padding or the end of sentence, too: then real tokens follow it.
        is_start = (False if start is None else ids == start) & ~nn.functional.pad(
            is_padding[:, 1:], (0, 1), value=True
        )
        return is_scored | is_start | ~is_padding


__all__ = ["GnmtMoePreTrainedModel", "GnmtMoeModel", "GnmtMoeForConditionalGeneration"]
