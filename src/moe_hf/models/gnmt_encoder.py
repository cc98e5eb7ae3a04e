"""The encoder of the translation model (appendix E).

Shape suffixes: B batch, S source length, D width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .bidirectional_lstm import BidirectionalLstmLayer
from .configuration_gnmt_moe import GnmtMoeConfig
from .embedding import TokenEmbedding
from .inputs import check_ids, check_keywords, padding_mask
from .lstm import LstmLayer
from .moe import MoeBlock
from .pretrained_gnmt_moe import GnmtMoePreTrainedModel, GnmtMoeStack


@dataclass
class GnmtMoeEncoderOutput(BaseModelOutput):
    """The library's fields, router_logits, and aux_loss: the weighted balancing losses, only when asked for.

    generate() never asks: it repeats every tensor of this object for each beam.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class GnmtMoeEncoder(GnmtMoeStack):
    """Embedding, a first LSTM in both directions, further LSTM and MoE layers."""

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
        output_aux_loss: bool = False,
        **kwargs,
    ) -> GnmtMoeEncoderOutput:
        """
        Args:
            input_ids: (B, S), or `inputs_embeds`: (B, S, D).
            attention_mask: (B, S), 0 for padding on either side; it changes nothing for the rest.
            output_aux_loss: whether to compute the balancing losses.
            output_hidden_states, output_router_logits (by name): whether to return them.

        Returns:
            last_hidden_state (B, S, D); at padding it means nothing.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, an id outside of the vocabulary, or a mask
                of another shape.
            TypeError: a keyword that is not used.
        """
        check_keywords(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        mask = padding_mask("attention_mask", attention_mask, inputs_embeds, has_past=False)
        hidden_states = self.dropout(inputs_embeds)
        aux_loss = self.no_aux_loss(hidden_states, output_aux_loss)
        both_directions = None  # what the bidirectional layer gives besides their mean, for an LSTM right after it
        for index, (name, layer) in enumerate(zip(self.config.encoder_layer_pattern, self.layers)):
            if index == 0 and self.config.encoder_bidirectional_first:
                hidden_states, both_directions = layer(hidden_states, mask)
                continue
            if name == "lstm":
                hidden_states, _, _ = layer(hidden_states, mask, None, None, both_directions)
            else:
                hidden_states, aux_loss = self.run_moe(layer, hidden_states, mask, aux_loss)
            both_directions = None  # layers further up read hidden_states
        return GnmtMoeEncoderOutput(last_hidden_state=hidden_states, aux_loss=aux_loss)
