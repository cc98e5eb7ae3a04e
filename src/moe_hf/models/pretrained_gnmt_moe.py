"""What the parts of the translation model share: Transformers' hooks, and the one place where a MoE layer is run."""

import torch
from transformers.utils.output_capturing import OutputRecorder

from .attention import GnmtAttention
from .attention_lstm import AttentionLstmLayer
from .configuration_gnmt_moe import GnmtMoeConfig
from .configuration_moe import EXPERTS_EP_PLAN, EXPERTS_TP_PLAN, FSDP_PLAN
from .moe import MoeBlock, layer_balancing_loss
from .pretrained_moe import MoePreTrainedModel


class GnmtMoePreTrainedModel(MoePreTrainedModel):
    """What Transformers needs to know of this family."""

    config_class = GnmtMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LstmLayer", "BidirectionalLstmLayer", "AttentionLstmLayer", "MoeBlock"]
    _can_record_outputs = MoePreTrainedModel._can_record_outputs | {
        "cross_attentions": OutputRecorder(AttentionLstmLayer, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GnmtAttention):
            module.reset_parameters()

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # The library resizes the source's embedding and the softmax, and ties the latter again afterwards.
        decoder = self.get_decoder()
        if not self.config.share_embeddings and decoder is not self:
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


class GnmtMoeStack(GnmtMoePreTrainedModel):
    """What encoder and decoder have in common."""

    # Here and not in the configuration, whose plans would get a wrong prefix.
    _tp_plan = EXPERTS_TP_PLAN
    _ep_plan = EXPERTS_EP_PLAN
    _fsdp_plan = FSDP_PLAN

    def no_aux_loss(self, hidden_states: torch.Tensor, is_asked_for: bool) -> torch.Tensor | None:
        """What the balancing losses are added to: zero, or None when they are not asked for."""
        return hidden_states.new_zeros((), dtype=torch.float32) if is_asked_for else None

    def run_moe(
        self, layer: MoeBlock, hidden_states: torch.Tensor, mask: torch.Tensor | None, aux_loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a MoE layer, and add its balancing losses to `aux_loss` unless that is None."""
        hidden_states, importance, load, _, threshold_loss = layer(hidden_states, mask, aux_loss is not None)
        if aux_loss is not None:
            layer_loss = layer_balancing_loss(self.config, importance, load, threshold_loss)
            aux_loss = aux_loss.to(layer_loss.device) + layer_loss
        return hidden_states, aux_loss
