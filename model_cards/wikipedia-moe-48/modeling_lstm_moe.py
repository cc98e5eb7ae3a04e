"""The LSTM-MoE language model (Shazeer et al., 2017, appendices C and D).

Shape suffixes: B batch, S sequence, D width, V vocabulary, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import ModelOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, cache_of, keeps_lstm_state, one_cache
from .configuration_lstm_moe import LstmMoeConfig
from .generation_moe import MoeGenerationMixin
from .lstm import LstmLayer, row_lengths
from .moe import MoeBlock
from .packing import DocumentLanes, document_starts, lay_out
from .pretrained_moe import MoePreTrainedModel, TokenEmbedding, padding_mask
from .softmax_loss import SoftmaxHead
from .task_loss import (
    check_loss_is_ours,
    problem_type_of,
    summed_classification_loss,
    summed_cross_entropy,
)


@dataclass
class LstmMoeModelOutput(MoeModelOutputWithPast):
    """Output of `LstmMoeModel`: the library's fields, and `aux_loss`, the weighted balancing losses (a scalar)."""

    aux_loss: torch.Tensor | None = None


@dataclass
class LstmMoeSequenceClassifierOutput(ModelOutput):
    """Output of `LstmMoeForSequenceClassification`; `aux_loss` is the weighted balancing losses (a scalar)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class LstmMoePreTrainedModel(MoePreTrainedModel):
    """The attributes of this family for Transformers."""

    config_class = LstmMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LstmLayer", "MoeBlock"]


class LstmMoeModel(LstmMoePreTrainedModel):
    """The language model without the softmax: embedding and layers."""

    def __init__(self, config: LstmMoeConfig):
        super().__init__(config)
        self.embed_tokens = TokenEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        layer_classes = {"lstm": LstmLayer, "moe": MoeBlock}
        self.layers = nn.ModuleList(layer_classes[name](config) for name in config.layer_pattern)
        self.post_init()

    @can_return_tuple
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_statistics: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> LstmMoeModelOutput:
        """
        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S) or (B, past + S), 0 for padding on either side. Padding does not change other
                positions.
            past_key_values: the state after earlier tokens; updated in place.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            use_cache: whether to return the state; by default `config.use_cache`, except while training and for packed
                rows.
            output_statistics: whether to compute the gates' statistics, and the balancing losses from them; by default
                only while training.
            position_ids: (B, S). Where they do not increase, a new document begins, which starts from a zero state.
                The model does not use positions otherwise.
            seq_idx: (B, S), the index of each position's document, as an alternative to `position_ids`.
            cu_seq_lens_q: (documents + 1,), the start of each document in a single row, as another alternative.
            cu_seq_lens_k: not used.
            max_length_q: not used.
            max_length_k: not used.
            cache: another name for `past_key_values`.
            **kwargs: `output_hidden_states` and `output_router_logits`, whether to return them.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, an id is outside the vocabulary,
                a mask has another shape, the cache is of another kind or batch size, a cache is given with packed
                rows, or output_attentions is True.
            TypeError: a keyword is not known.
        """
        self._check_keywords(kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True: this model does not use attention, only False is allowed")
        inputs_embeds = self._embed(input_ids, inputs_embeds, self.embed_tokens)
        mask, lengths = row_lengths(padding_mask("attention_mask", attention_mask, inputs_embeds))
        documents = self._documents(inputs_embeds, mask, position_ids, seq_idx, cu_seq_lens_q)
        past_key_values = one_cache(past_key_values, cache)
        if documents is not None:
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "position_ids, seq_idx or cu_seq_lens_q pack several documents into a row, which do not share a "
                    "state: only past_key_values=None and use_cache=False are allowed"
                )
            use_cache = False
        use_cache, output_statistics = self._with_defaults(use_cache, output_statistics)
        past_key_values = self._usable_cache(past_key_values, use_cache)

        hidden_states = self.dropout(inputs_embeds)
        aux_loss = self._zero_aux_loss(hidden_states, output_statistics)
        for index, (name, layer) in enumerate(zip(self.config.layer_pattern, self.layers)):
            if name == "lstm":
                h, c = (None, None) if past_key_values is None else past_key_values.layers[index].state
                hidden_states, h, c = layer(hidden_states, mask, h, c, documents=documents, lengths=lengths)
                if past_key_values is not None:
                    past_key_values.update(h, c, index, num_tokens=hidden_states.shape[1])
            else:
                hidden_states, aux_loss = self._run_moe(layer, hidden_states, mask, aux_loss)
        return LstmMoeModelOutput(last_hidden_state=hidden_states, aux_loss=aux_loss, **{CACHE_NAME: past_key_values})

    def _documents(self, inputs_embeds, mask, *boundaries) -> DocumentLanes | None:
        starts = document_starts(inputs_embeds.shape[:2], *boundaries, mask_BS=mask)
        if starts is None:
            return None
        # Only the CPU kernel can restart the state within a lane.
        return lay_out(starts.to(inputs_embeds.device), mask, one_a_lane=inputs_embeds.device.type != "cpu")

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self.config)

    def _check_cache(self, past_key_values: Cache) -> None:
        layers = past_key_values.layers
        for index, name in enumerate(self.config.layer_pattern):
            if name == "lstm" and not (index < len(layers) and keeps_lstm_state(layers[index])):
                raise ValueError(
                    f"past_key_values={past_key_values} cannot hold the LSTM state of layer {index}, build it with "
                    "DynamicCache(config=model.config)"
                )


class LstmMoeForCausalLM(LstmMoePreTrainedModel, MoeGenerationMixin):
    """The language model: `LstmMoeModel` and the softmax over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LstmMoeConfig):
        super().__init__(config)
        self.model = LstmMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = SoftmaxHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set `lm_head`; a plain linear layer, such as from `resize_token_embeddings`, becomes a `SoftmaxHead`."""
        if type(new_embeddings) is nn.Linear and new_embeddings.bias is None:
            new_embeddings = SoftmaxHead.from_linear(new_embeddings)
        super().set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        output_statistics: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S) or (B, past + S), 0 for padding on either side; it changes nothing for the rest.
            past_key_values: the state after earlier tokens; it is updated in place.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            labels: (B, S) int64, the tokens themselves (shifted here); -100, padding and the first token of a document
                are not scored.
            use_cache: whether to return the state; by default `config.use_cache`, but neither while training nor of
                packed rows.
            logits_to_keep: compute the logits of this many last positions only (0: all), or of these positions.
            num_items_in_batch: number of scored tokens in the whole batch of an optimizer step, over all micro-batches
                and processes. The task loss is divided by it, and the balancing losses are weighed by this
                micro-batch's share of it: their gradient is the mean over the micro-batches.
            position_ids: (B, S); where they do not rise, another document begins, see `LstmMoeModel`.
            seq_idx: (B, S), the number of each position's document.
            cu_seq_lens_q: (documents + 1,), where each document of one row begins.
            skip_logits: whether to leave out the logits where the loss needs none, see below; by default while
                training only.
            cache: another name of `past_key_values`.
            output_statistics: whether to compute the balancing losses; by default with labels, and while training.
            **kwargs: `shift_labels`, (B, S) int64, instead of `labels`: the token that follows each position; and what
                else `LstmMoeModel` takes.

        Returns:
            loss: while training the task loss plus the balancing losses, in evaluation the task loss alone (so that
                exp(loss) is a perplexity). `config.label_smoothing` is for training too. aux_loss: the balancing
                losses, already weighted. logits: (B, S, V), or None with `skip_logits` where the loss needs none: with
                labels and `config.loss_chunk_size`, or with labels while training with `config.num_sampled`, when the
                task loss is an estimate (see `sampled_softmax_loss`).

        Raises:
            ValueError: `num_items_in_batch` without labels, and what `LstmMoeModel` raises.
        """
        # Not in the signature: the Trainer requires every argument with "label" in its name in every batch.
        shift_labels = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        check_loss_is_ours(num_items_in_batch, has_labels)
        boundaries = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
        outputs: LstmMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_statistics=self._needs_statistics(output_statistics, has_labels),
            **boundaries,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)

        logits = loss = targets = nats = None
        if has_labels:
            shape = outputs.last_hidden_state.shape[:2]
            mask = None if attention_mask is None else attention_mask[:, -shape[1] :]
            starts = document_starts(shape, *boundaries.values(), mask_BS=mask)
            targets = _targets(labels, shift_labels, attention_mask, starts)
            if self._computes_loss_without_logits():
                nats = self._nats_without_logits(hidden_states, targets)
        if nats is None or not (self.training if skip_logits is None else skip_logits):
            logits = self.lm_head(hidden_states)
        if has_labels:
            nats = summed_cross_entropy(logits, targets, self._label_smoothing) if nats is None else nats
            loss = self._loss_of_batch(nats, targets, num_items_in_batch, outputs.aux_loss)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: cache_of(outputs)},
        )

    def _computes_loss_without_logits(self) -> bool:
        return self.config.loss_chunk_size is not None or (self.training and self.config.num_sampled is not None)

    def _nats_without_logits(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the task loss, summed over the scored tokens; evaluation always uses the full softmax."""
        nats = self.lm_head(
            hidden_states,
            targets=targets,  # by name, because tensor parallelism passes on only one positional argument
            num_sampled=self.config.num_sampled if self.training else None,
            chunk_size=self.config.loss_chunk_size,
            label_smoothing=self._label_smoothing,
        )
        if nats.dim():
            raise ValueError(
                "lm_head is wrapped by an adapter, which would add logits to the loss from inside lm_head: adapt its "
                "weight (PEFT: target_parameters=['lm_head.weight']), or set loss_chunk_size and num_sampled to None"
            )
        return nats


def _targets(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Return (B, S) next tokens, or -100 at padding, before padding, and before another document.

    With left padding, the first real token is not predicted by another token and is not scored.
    """
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, -(labels if shift_labels is None else shift_labels).shape[1] :].bool()
    if shift_labels is None:
        if mask is not None:
            labels = labels.masked_fill(~mask.to(labels.device), -100)
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if mask is not None:
        shift_labels = shift_labels.masked_fill(~mask.to(shift_labels.device), -100)
    if starts is not None:
        is_last = nn.functional.pad(starts[:, 1:], (0, 1))
        shift_labels = shift_labels.masked_fill(is_last.to(shift_labels.device), -100)
    return shift_labels


def last_token(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pad_token_id: int | None
) -> torch.Tensor | int:
    """Return the position of each row's last real token with left or right padding: (B,), or -1 for the last position.

    Args:
        input_ids: (B, S), or None. Without a mask, the last id other than `pad_token_id` counts.
        attention_mask: (B, S), 0 for padding, or None.
        pad_token_id: the id of padding, or None.

    Raises:
        ValueError: there are several rows, but neither a mask nor a `pad_token_id`.
    """
    if attention_mask is not None:
        is_real_BS = attention_mask.bool()
    elif input_ids is not None and pad_token_id is not None:
        is_real_BS = input_ids != pad_token_id
    elif input_ids is not None and len(input_ids) > 1:
        raise ValueError(
            "pad_token_id=None and attention_mask=None: give one of them to find the last token of each row"
        )
    else:
        return -1
    positions_S = torch.arange(is_real_BS.shape[1], device=is_real_BS.device)
    return (positions_S * is_real_BS).argmax(dim=-1)


class LstmMoeForSequenceClassification(LstmMoePreTrainedModel):
    """`LstmMoeModel` and a linear layer on each text's last token, for one class, several labels, or numbers."""

    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # a classifier starts from a language model

    def __init__(self, config: LstmMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LstmMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_statistics: bool | None = None,
        **kwargs: Any,
    ) -> LstmMoeSequenceClassifierOutput:
        """
        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 for padding on either side. None: the last token other than `pad_token_id` is the
                text's last token.
            inputs_embeds: (B, S, D), instead of `input_ids`.
            labels: (B,) classes, -100 for a text that is not scored; (B, num_labels) for several labels or numbers;
                (B,) numbers with `num_labels=1`. `config.problem_type` or the labels' dtype decides.
            num_items_in_batch: number of labels in the whole batch of an optimizer step, over all micro-batches and
                processes. The task loss is divided by this number, and the balancing losses are weighted by this
                micro-batch's share of it.
            output_statistics: whether to compute the balancing losses; by default with labels, and while training.
            **kwargs: `output_hidden_states` and `output_router_logits`, whether to return them.

        Returns:
            loss: the mean cross-entropy, binary cross-entropy or squared error. While training, cross-entropy uses
                `config.label_smoothing`, and the balancing losses are added. aux_loss: the weighted balancing losses.
                logits: (B, num_labels).

        Raises:
            ValueError: the labels have another shape or an unknown class, padding cannot be recognised, or
                `LstmMoeModel` raises it.
            TypeError: a keyword is not known.
        """
        if kwargs.pop("use_cache", None):  # TRL passes False
            raise ValueError("use_cache=True: a classifier does not return a state, only False is allowed")
        self._check_keywords(kwargs)
        check_loss_is_ours(num_items_in_batch, labels is not None)
        outputs: LstmMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_statistics=self._needs_statistics(output_statistics, labels is not None),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = last_token(input_ids, attention_mask, self.config.pad_token_id)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        logits = self.score(hidden_states[rows, last])

        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            # Stored in the configuration, as in the library: pipelines use it to choose between softmax and sigmoid.
            self.config.problem_type = problem_type_of(self.config, labels)
            total = summed_classification_loss(logits, labels, self.config.problem_type, self._label_smoothing)
            loss = self._loss_of_batch(total, labels, num_items_in_batch, outputs.aux_loss)
        return LstmMoeSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=outputs.aux_loss,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )


__all__ = ["LstmMoePreTrainedModel", "LstmMoeModel", "LstmMoeForCausalLM", "LstmMoeForSequenceClassification"]
