"""The configuration that both model families share: the MoE layers and their balancing losses."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

GATINGS = ("noisy_top_k", "softmax_top_k", "softmax", "strictly_balanced")
LAYER_NAMES = ("lstm", "moe")

# How experts are sharded over devices: tensor parallelism cuts each expert, expert parallelism keeps each expert
# whole.
EXPERTS_TP_PLAN = {
    "layers.*.experts.up_proj": "colwise",
    "layers.*.experts.down_proj": "rowwise",
    "layers.*.experts": "moe_tp_experts",
}
EXPERTS_EP_PLAN = {
    "layers.*.experts.up_proj": "grouped_gemm",
    "layers.*.experts.down_proj": "grouped_gemm",
    "layers.*.experts": "ep_dispatch_experts",
}
# The modules whose parameters FSDP2 gathers and frees together.
FSDP_PLAN = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}


@strict
class MoeConfig(PreTrainedConfig):
    r"""
    The arguments of MoE layers, for both model families.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of embedding, layers and softmax input.
        lstm_hidden_size: units of an LSTM's cell. If it differs from `hidden_size`, the output is projected to
            `hidden_size`.
        dropout: dropout on the output of the embedding and of every layer, before the residual sum.
        num_experts: experts in each MoE layer (n).
        num_experts_per_tok: experts per token (k), over all groups; None: 4, or all experts with gating="softmax".
        moe_intermediate_size: hidden size of an expert (h).
        num_expert_layers: hidden layers of an expert; more than one needs the "eager" experts implementation.
        hidden_act: activation inside an expert.
        gating: the gate. "noisy_top_k": the paper's noisy top-k gating. "softmax_top_k": without noise, renormalised
            over the top k. "softmax": dense, every token uses every expert. "strictly_balanced": while training, every
            expert gets the same number of tokens of a batch, and a token gets num_experts_per_tok experts on average;
            in evaluation, trained thresholds choose.
        num_expert_groups: number of groups of a hierarchical gate (a in appendix B), a divisor of `num_experts`; only
            with gating="noisy_top_k". None: a flat gate.
        num_groups_per_tok: groups per token, with num_experts_per_tok / num_groups_per_tok experts in each; unused
            with a flat gate.
        noise_epsilon: the minimal standard deviation of the gating noise. 0 is the paper's exact formula, whose
            gradient is undefined where the softplus underflows.
        importance_loss_coef: weight of CV(Importance)^2 in the training loss (w_importance).
        load_loss_coef: weight of CV(Load)^2 in the training loss (w_load); not used by strictly balanced gating.
        label_smoothing: share of the target's probability that is spread over the vocabulary while training.
        threshold_loss_coef: weight of L_batchwise per token, which trains the thresholds of strictly balanced gating.
            The paper does not give a weight.
        recompute_experts: whether to recompute the experts' activations in the backward pass instead of storing them,
            mainly the k * h hidden activations of every token (appendix D). The result is the same, at the cost of one
            more forward pass of the experts. `activation_checkpointing_enable()` recomputes whole layers.
        output_router_logits: whether to return the logits of every gate; for a hierarchical gate, over its groups.
        tie_word_embeddings: whether embedding and softmax share one matrix.
        scale_embedding: whether the embedding's output is multiplied by hidden_size ** 0.5, so that the layers get
            inputs of unit variance from the start.
        initializer_range: initial standard deviation of embedding and softmax; None: hidden_size ** -0.5. LSTMs and
            experts are scaled by their number of inputs. Gates start as `gate_std` says, strictly balanced gates close
            to zero.
        gate_std: standard deviation of a new gate's logits, for an input of unit variance. 0 (the paper's): the gates
            start at zero, and at first only the noise chooses experts. With many experts and little text, the logits
            may never rise above the noise (docs/reproduction/capacity.md); then 3 to 6, well above the initial noise
            of 0.7, gives every token its own experts from the start.

    Raises:
        StrictDataclassClassValidationError: a value is not allowed; the message names the argument, the value and what
            is allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    base_model_fsdp_plan = FSDP_PLAN

    vocab_size: int = 32000
    hidden_size: int = 512
    lstm_hidden_size: int | None = None
    dropout: float | int = 0.1
    num_experts: int = 32
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1024
    num_expert_layers: int = 1
    hidden_act: str = "relu"
    gating: str = "noisy_top_k"
    num_expert_groups: int | None = None
    num_groups_per_tok: int = 2
    noise_epsilon: float | int = 1e-2
    importance_loss_coef: float | int = 0.1
    load_loss_coef: float | int = 0.1
    threshold_loss_coef: float | int = 0.1
    label_smoothing: float | int = 0.0
    recompute_experts: bool = False
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    scale_embedding: bool = True
    initializer_range: float | int | None = None
    gate_std: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = self.num_experts if self.gating == "softmax" else 4
        super().__post_init__(**kwargs)
        if getattr(self, "auto_map", None) is None:
            self.auto_map = {}  # TRL reads it without checking that it exists

    @property
    def num_attention_heads(self) -> int:
        """Always 1, for libraries that read it, such as PEFT's prompt tuning.

        The translation model's attention has one head; the language model does not use attention.
        """
        return 1

    @num_attention_heads.setter
    def num_attention_heads(self, value: int):
        if value != 1:  # the library's own tests set it and do not expect an error
            logger.warning(
                f"num_attention_heads={value} has no effect: these models have one head, or do not use attention"
            )

    def to_dict(self) -> dict:
        """Return the arguments, and `num_attention_heads`, which PEFT reads from here."""
        output = super().to_dict() | {"num_attention_heads": self.num_attention_heads}
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    def to_diff_dict(self) -> dict:
        """Return the arguments that are saved: those that differ from the library's defaults."""
        output = super().to_diff_dict()
        del output["num_attention_heads"]
        return output

    def validate_experts(self):
        """Check experts and gating."""
        if self.gating not in GATINGS:
            raise ValueError(f"gating={self.gating!r} is not known, use one of {', '.join(GATINGS)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not known, use one of {', '.join(ACT2FN)}")
        if self.num_experts_per_tok > self.num_experts >= 1:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")
        if self.gating == "strictly_balanced" and self.gate_std:
            raise ValueError(
                f"gate_std={self.gate_std} has no effect with gating='strictly_balanced', which ranks the tokens of "
                "each expert: leave it out"
            )
        if self.gating == "softmax" and self.num_experts_per_tok != self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be num_experts={self.num_experts} (or left out) "
                "with gating='softmax', which is dense; gating='softmax_top_k' keeps fewer"
            )

    def validate_groups(self):
        """Check the two levels of a hierarchical gate."""
        groups, per_tok = self.num_expert_groups, self.num_groups_per_tok
        if groups is None or groups < 1 or per_tok < 1:
            return  # a flat gate, or refused by `validate_ranges`
        if self.gating != "noisy_top_k":
            raise ValueError(f"num_expert_groups={groups} needs gating='noisy_top_k', not {self.gating!r}")
        if self.num_experts % groups:
            raise ValueError(f"num_expert_groups={groups} does not divide num_experts={self.num_experts}")
        if per_tok > groups:
            raise ValueError(f"num_groups_per_tok={per_tok} exceeds num_expert_groups={groups}")
        if self.num_experts_per_tok % per_tok:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be a multiple of num_groups_per_tok={per_tok}"
            )
        if self.num_experts_per_tok // per_tok > self.num_experts // groups:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} in num_groups_per_tok={per_tok} groups exceeds the "
                f"num_experts / num_expert_groups = {self.num_experts // groups} experts of a group"
            )

    def validate_ranges(self):
        """Check that sizes are at least 1, dropout is a probability, and coefficients are not negative."""
        sizes = ["vocab_size", "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"]
        sizes += ["num_expert_layers", "num_groups_per_tok"]
        sizes += [name for name in ("lstm_hidden_size", "num_expert_groups") if getattr(self, name) is not None]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        for name in ("gate_std", "noise_epsilon", "importance_loss_coef", "load_loss_coef", "threshold_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite, and must not be negative")
        if self.initializer_range is not None and not 0 < self.initializer_range < math.inf:
            raise ValueError(f"initializer_range={self.initializer_range} must be above 0 and finite, or left out")

    @staticmethod
    def check_layer_names(name: str, pattern: list[str]) -> None:
        """Refuse a layer pattern with an unknown layer, or without an "lstm" layer."""
        unknown = [layer for layer in pattern if layer not in LAYER_NAMES]
        if unknown:
            raise ValueError(f"{name}={pattern}: {unknown[0]!r} is not a layer, use {' or '.join(LAYER_NAMES)}")
        if "lstm" not in pattern:
            raise ValueError(f"{name}={pattern} needs at least one 'lstm' layer")
