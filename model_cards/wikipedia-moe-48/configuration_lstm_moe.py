"""Configuration of the LSTM-MoE language model."""

# Imported first: with another Transformers, the imports below would fail with an error that does not name the version.
from .versions import TRANSFORMERS  # noqa: F401

# isort: split
from huggingface_hub.dataclasses import strict

from .configuration_moe import EXPERTS_EP_PLAN, EXPERTS_TP_PLAN, MoeConfig


@strict
class LstmMoeConfig(MoeConfig):
    r"""
    The language model of Shazeer et al. (2017), appendices C and D: embedding, layers, softmax.

    The paper's models differ in a few arguments:

    - MoE-32: `layer_pattern=["lstm", "moe", "lstm"]`, `num_experts=32`.
    - MoE-1024-h: `num_experts=1024`, `num_expert_groups=16`.
    - MoE-1-Wide: `num_experts=1`, `num_experts_per_tok=1`, `moe_intermediate_size=4096`.
    - 4xLSTM-512: `layer_pattern=["lstm"] * 4`.
    - LSTM-2048-512: `layer_pattern=["lstm"]`, `lstm_hidden_size=2048`.

    The arguments of `MoeConfig` are allowed too. With `num_sampled` or `loss_chunk_size`, a training output has
    `logits=None`.

    Attributes:
        layer_pattern: the layers in order, each "lstm" or "moe", with at least one "lstm".
        use_cache: whether to return the LSTM state outside of training.
        num_sampled: number of classes that estimate the softmax while training (importance sampling, appendix C),
            below `vocab_size`. The sampler expects ids in order of falling frequency; another order gives a correct
            but noisier estimate. None: the full softmax. Evaluation and generation always use the full softmax.
        loss_chunk_size: number of tokens whose logits are in memory at once in the loss, which does not change the
            result. None: all tokens.

    Raises:
        StrictDataclassClassValidationError: a value is not allowed; the message names the argument, the value and what
            is allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.

    ```python
    >>> from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

    >>> model = LstmMoeForCausalLM(LstmMoeConfig(vocab_size=1000, hidden_size=64, num_experts=8))
    ```
    """

    model_type = "lstm_moe"
    # The Trainer leaves these out of predictions. Router logits have one row per position, not per text.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits"]
    base_model_tp_plan = EXPERTS_TP_PLAN
    base_model_ep_plan = EXPERTS_EP_PLAN

    layer_pattern: list[str] | tuple[str, ...] = ("lstm", "moe", "lstm")
    use_cache: bool = True
    num_sampled: int | None = None
    loss_chunk_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.layer_pattern, tuple):
            self.layer_pattern = list(self.layer_pattern)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, from `layer_pattern`."""
        return len(self.layer_pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        if value != len(self.layer_pattern):
            raise NotImplementedError(
                f"num_hidden_layers={value} cannot be set: it follows from layer_pattern={self.layer_pattern}"
            )

    @property
    def layer_types(self) -> list[str]:
        """Layer types for Transformers' caches: "lstm" layers have a state, "moe" layers do not."""
        return self.layer_pattern

    def validate_layer_type(self):
        """Check the layers' names; replaces the library's check, which only knows its own names."""
        self.check_layer_names("layer_pattern", self.layer_pattern)

    def validate_softmax(self):
        """Check num_sampled and loss_chunk_size: at least 1, and num_sampled below the vocabulary."""
        for name in ("num_sampled", "loss_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or left out")
        if self.num_sampled is not None and self.num_sampled >= self.vocab_size:
            raise ValueError(
                f"num_sampled={self.num_sampled} must be below vocab_size={self.vocab_size}, or left out for the full "
                "softmax"
            )
        if self.num_sampled is not None and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} needs the full softmax; with num_sampled={self.num_sampled} "
                "only 0 is allowed"
            )


__all__ = ["LstmMoeConfig"]
