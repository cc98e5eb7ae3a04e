"""The LSTM-MoE language model (Shazeer et al., 2017, appendices C and D).

Shape suffixes: B batch, S sequence, D width, V vocabulary, E experts.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache import keeps_lstm_state
from .configuration_lstm_moe import LstmMoeConfig
from .embedding import TokenEmbedding
from .inputs import check_ids, padding_mask
from .lstm import LstmLayer
from .moe import MoeBlock, layer_balancing_loss
from .pretrained_moe import MoePreTrainedModel
from .softmax_loss import SoftmaxHead


@dataclass
class LstmMoeModelOutput(MoeModelOutputWithPast):
    """Output of `LstmMoeModel`: the library's fields, and `aux_loss`, the weighted balancing losses (a scalar)."""

    aux_loss: torch.Tensor | None = None


class LstmMoePreTrainedModel(MoePreTrainedModel):
    """What Transformers needs to know of this family."""

    config_class = LstmMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LstmLayer", "MoeBlock"]


class LstmMoeModel(LstmMoePreTrainedModel):
    """Embedding and layers, without the softmax."""

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
        output_aux_loss: bool | None = None,
        **kwargs,
    ) -> LstmMoeModelOutput:
        """
        Args:
            input_ids: (B, S), or `inputs_embeds`: (B, S, D).
            attention_mask: (B, S) or (B, past + S), 0 for padding on either side; it changes nothing for the rest.
            past_key_values: the state after earlier tokens; it is updated in place.
            use_cache: whether to return the state; by default `config.use_cache`, but not while training.
            output_aux_loss: whether to compute the balancing losses; by default only while training.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, an id outside of the vocabulary, a mask of
                another shape, or a cache of another kind or batch size.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        if output_aux_loss is None:
            output_aux_loss = self.training

        mask = padding_mask("attention_mask", attention_mask, inputs_embeds)
        hidden_states = self.dropout(inputs_embeds)
        aux_loss = hidden_states.new_zeros((), dtype=torch.float32) if output_aux_loss else None
        for index, (name, layer) in enumerate(zip(self.config.layer_pattern, self.layers)):
            if name == "lstm":
                h, c = (None, None) if past_key_values is None else past_key_values.layers[index].state
                hidden_states, h, c = layer(hidden_states, mask, h, c)
                if past_key_values is not None:
                    past_key_values.update(h, c, index, num_tokens=hidden_states.shape[1])
            else:
                hidden_states, importance, load, _, threshold_loss = layer(hidden_states, mask, output_aux_loss)
                if output_aux_loss:
                    layer_loss = layer_balancing_loss(self.config, importance, load, threshold_loss)
                    aux_loss = aux_loss.to(layer_loss.device) + layer_loss
        return LstmMoeModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values, aux_loss=aux_loss)

    def _check_cache(self, past_key_values: Cache) -> None:
        layers = past_key_values.layers
        for index, name in enumerate(self.config.layer_pattern):
            if name == "lstm" and not (index < len(layers) and keeps_lstm_state(layers[index])):
                raise ValueError(
                    f"past_key_values={past_key_values} keeps no LSTM state for layer {index}, build it with "
                    "DynamicCache(config=model.config)"
                )


class LstmMoeForCausalLM(LstmMoePreTrainedModel, GenerationMixin):
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
        """Set `lm_head`; a plain linear layer, as `resize_token_embeddings` makes it, becomes a `SoftmaxHead`."""
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
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache: see `LstmMoeModel`.
            labels: (B, S), the tokens themselves (shifted here); -100 and padding are not scored.
            shift_labels (by name): (B, S), instead of `labels`: the token that follows each position.
            logits_to_keep: compute the logits of this many last positions only (0: all), or of these positions.
            num_items_in_batch: number of scored tokens in the whole batch of an optimizer step, over all micro-batches
                and processes. The task loss is divided by it, and the balancing losses are weighed by this
                micro-batch's share of it: their gradient is the mean over the micro-batches.

        Returns:
            loss: while training the task loss plus the balancing losses, in evaluation the task loss alone (so that
                exp(loss) is a perplexity). aux_loss: the balancing losses, already weighted. logits: (B, S, V), or
                None where the loss needs none: with labels and `config.loss_chunk_size`, or with labels while training
                with `config.num_sampled`, when the task loss is an estimate (see `sampled_softmax_loss`).
        """
        # Not in the signature: the Trainer takes each argument named "label" there for one that every batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        outputs: LstmMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_aux_loss=has_labels or self.training,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        targets = _targets(labels, shift_labels, attention_mask) if has_labels else None

        logits = loss = None
        if has_labels and self._computes_loss_without_logits():
            loss = self._loss_without_logits(hidden_states, targets, num_items_in_batch)
        else:
            logits = self.lm_head(hidden_states)
            if has_labels:
                loss = self.loss_function(
                    logits=logits,
                    labels=None,
                    shift_labels=targets,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )
        if has_labels and self.training:
            share = 1.0
            if num_items_in_batch is not None:
                share = (targets != -100).sum() / num_items_in_batch
            loss = loss + (outputs.aux_loss * share).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def _computes_loss_without_logits(self) -> bool:
        return self.config.loss_chunk_size is not None or (self.training and self.config.num_sampled is not None)

    def _loss_without_logits(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The task loss; evaluation always takes the full softmax."""
        total = self.lm_head(
            hidden_states,
            targets=targets,  # by name, as tensor parallelism passes on one positional argument
            num_sampled=self.config.num_sampled if self.training else None,
            chunk_size=self.config.loss_chunk_size,
        )
        if total.dim():
            raise ValueError(
                "lm_head is wrapped by an adapter, which adds logits to the loss computed inside of it: adapt its "
                "weight (PEFT: target_parameters=['lm_head.weight']), or set loss_chunk_size and num_sampled to None"
            )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum().clamp(min=1)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _targets(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, S) next tokens, -100 where the position or the next token is padding.

    Under left padding the first real token has no predictor and is not scored.
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
    return shift_labels


__all__ = ["LstmMoePreTrainedModel", "LstmMoeModel", "LstmMoeForCausalLM"]
