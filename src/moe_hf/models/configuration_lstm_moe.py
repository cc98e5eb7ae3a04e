"""Configuration of the LSTM-MoE language model."""

# First: with another Transformers one of the imports below would fail, with an error that names no version.
from .versions import TRANSFORMERS  # noqa: F401

# isort: split
from huggingface_hub.dataclasses import strict

from .configuration_moe import EXPERTS_EP_PLAN, EXPERTS_TP_PLAN, MoeConfig


@strict
class LstmMoeConfig(MoeConfig):
    r"""
    The language model of Shazeer et al. (2017), appendices C and D: embedding, layers, softmax.

    The paper's rows are spelt with `layer_pattern`: `["lstm", "moe", "lstm"]` with `num_experts=32` is MoE-32,
    `["lstm"] * 4` is 4xLSTM-512, `["lstm"]` with `lstm_hidden_size=2048` is LSTM-2048-512, and `num_experts=1`,
    `num_experts_per_tok=1`, `moe_intermediate_size=4096` is MoE-1-Wide, `num_experts=1024`, `num_expert_groups=16` is
    MoE-1024-h. The arguments of `MoeConfig` are allowed too.

    With `num_sampled` or `loss_chunk_size` a training output has `logits=None`.

    Attributes:
        layer_pattern: the layers in order, each "lstm" or "moe", at least one of them "lstm".
        use_cache: whether to return the LSTM state outside of training.
        num_sampled: classes that the softmax is estimated from while training (importance sampling, appendix C), below
            `vocab_size`. Meant for ids by falling frequency; any other order is corrected for too, with more noise.
            None: the full softmax, which evaluation and generation always use.
        loss_chunk_size: tokens whose logits exist at once while a loss is computed; the loss is the same. None: all.

    Raises:
        StrictDataclassClassValidationError: a value is not allowed; the message names the argument, the value and what
            is allowed.
        StrictDataclassFieldValidationError: a value is of another type.

    ```python
    >>> from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

    >>> model = LstmMoeForCausalLM(LstmMoeConfig(vocab_size=1000, hidden_size=64, num_experts=8))
    ```
    """

    model_type = "lstm_moe"
    # What the Trainer leaves out of predictions; router logits have a row for each position, not for each text.
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
        """Number of layers; it follows from `layer_pattern`."""
        return len(self.layer_pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        if value != len(self.layer_pattern):
            raise NotImplementedError(
                f"num_hidden_layers={value} cannot be set: it follows from layer_pattern={self.layer_pattern}"
            )

    @property
    def layer_types(self) -> list[str]:
        """What Transformers' caches ask for: "lstm" layers keep a state, "moe" layers none."""
        return self.layer_pattern

    def validate_layer_type(self):
        """Layer names (in place of the library's check, which knows only its own names)."""
        self.check_layer_names("layer_pattern", self.layer_pattern)

    def validate_softmax(self):
        """Sampled classes between 1 and the vocabulary, tokens of a chunk at least 1."""
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
