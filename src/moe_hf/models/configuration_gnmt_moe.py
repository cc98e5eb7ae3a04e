"""Configuration of the GNMT-MoE translation model."""

# First: with another Transformers one of the imports below would fail, with an error that names no version.
from .versions import TRANSFORMERS  # noqa: F401

# isort: split
from huggingface_hub.dataclasses import strict

from .configuration_moe import MoeConfig

ATTENTION_TYPES = ("product", "additive")
ATTENTION_FEEDINGS = ("recurrent", "input", "parallel")


@strict
class GnmtMoeConfig(MoeConfig):
    r"""
    The translation model of Shazeer et al. (2017), appendices E and G: a reduced GNMT with MoE layers in both stacks.

    The paper's models have `lstm_hidden_size=2048` and, with `num_experts=32` flat or `num_expert_groups` set, the
    defaults below; configs/translation has one file for each. The arguments of `MoeConfig` are allowed too, with the
    paper's dropout, expert size and loss weights for translation as defaults.

    Attributes:
        encoder_layer_pattern: the encoder's layers in order, each "lstm" or "moe", at least one of them "lstm".
        decoder_layer_pattern: the decoder's layers in order; the first is "lstm", which drives the attention.
        encoder_bidirectional_first: whether the encoder's first layer, which must then be "lstm", reads the source in
            both directions, each with `hidden_size` outputs; an LSTM right after it reads both, concatenated, a MoE
            layer their mean.
        attention_type: "product" (the paper's, two matrix products) or "additive" (GNMT's).
        attention_feeding: "recurrent" (as in GNMT: the query is the bottom LSTM's output of the previous step, all
            LSTMs of the decoder read the context), "input" (as "recurrent", but the LSTMs above the bottom one read
            the context of its output of the same step, so that it was looked for with the last token read) or
            "parallel" (the query is its output of the same step, only the LSTMs above it read the context: the whole
            bottom layer is one call).
        share_embeddings: whether source and target tokens have one embedding. `tie_word_embeddings` makes the softmax
            use the target's too.
        use_cache: whether to return the decoder's state outside of training.
        decoder_start_token_id: the token before the first one of the target; training from `labels` needs it.

    Raises:
        StrictDataclassClassValidationError: a value is not allowed; the message names the argument, the value and what
            is allowed.
        StrictDataclassFieldValidationError: a value is of another type.

    ```python
    >>> from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration

    >>> model = GnmtMoeForConditionalGeneration(GnmtMoeConfig(vocab_size=1000, hidden_size=64, num_experts=8))
    ```
    """

    model_type = "gnmt_moe"
    # What the Trainer leaves out of predictions; router logits have a row for each position, not for each text.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "aux_loss",
        "encoder_last_hidden_state",
        "encoder_router_logits",
        "decoder_router_logits",
    ]
    base_model_fsdp_plan = {}  # the plans stand with the encoder and the decoder, here they would get a wrong prefix

    dropout: float | int = 0.4
    moe_intermediate_size: int = 2048
    importance_loss_coef: float | int = 0.01
    load_loss_coef: float | int = 0.01
    encoder_layer_pattern: list[str] | tuple[str, ...] = ("lstm", "lstm", "moe", "lstm")
    decoder_layer_pattern: list[str] | tuple[str, ...] = ("lstm", "moe", "lstm")
    encoder_bidirectional_first: bool = True
    attention_type: str = "product"
    attention_feeding: str = "recurrent"
    share_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.encoder_layer_pattern, tuple):
            self.encoder_layer_pattern = list(self.encoder_layer_pattern)
        if isinstance(self.decoder_layer_pattern, tuple):
            self.decoder_layer_pattern = list(self.decoder_layer_pattern)
        super().__post_init__(**kwargs)

    @property
    def encoder_layers(self) -> int:
        """Number of the encoder's layers; it follows from `encoder_layer_pattern`."""
        return len(self.encoder_layer_pattern)

    @property
    def decoder_layers(self) -> int:
        """Number of the decoder's layers; it follows from `decoder_layer_pattern`."""
        return len(self.decoder_layer_pattern)

    @property
    def num_hidden_layers(self) -> int:
        """Number of the decoder's layers: those which `layer_types` and a cache know."""
        return len(self.decoder_layer_pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        if value != self.decoder_layers:
            raise NotImplementedError(
                f"num_hidden_layers={value} cannot be set: it follows from "
                f"decoder_layer_pattern={self.decoder_layer_pattern}"
            )

    @property
    def layer_types(self) -> list[str]:
        """What Transformers' caches ask for: a place for an LSTM's state per layer of the decoder, MoE or not.

        So a layer's number is its state's too. A MoE layer's place stays empty: an `EncoderDecoderCache` asks every
        layer for its length, which the layers that the library has for "moe" refuse.
        """
        return ["lstm"] * self.decoder_layers

    def get_text_config(self, decoder=None, encoder=None) -> "GnmtMoeConfig":
        """This configuration: the library would rename every argument that begins with "decoder" in a copy of it."""
        return self

    def validate_layer_type(self):
        """Layer names and order (in place of the library's check, which knows only its own names)."""
        self.check_layer_names("encoder_layer_pattern", self.encoder_layer_pattern)
        self.check_layer_names("decoder_layer_pattern", self.decoder_layer_pattern)
        if self.encoder_bidirectional_first and self.encoder_layer_pattern[0] != "lstm":
            raise ValueError(
                f"encoder_layer_pattern={self.encoder_layer_pattern} must start with 'lstm', or "
                "encoder_bidirectional_first be False"
            )
        if self.decoder_layer_pattern[0] != "lstm":
            raise ValueError(
                f"decoder_layer_pattern={self.decoder_layer_pattern} must start with 'lstm': it queries the attention"
            )

    def validate_attention(self):
        """Names of attention and feeding."""
        if self.attention_type not in ATTENTION_TYPES:
            raise ValueError(
                f"attention_type={self.attention_type!r} is not known, use one of {', '.join(ATTENTION_TYPES)}"
            )
        if self.attention_feeding not in ATTENTION_FEEDINGS:
            raise ValueError(
                f"attention_feeding={self.attention_feeding!r} is not known, use one of "
                f"{', '.join(ATTENTION_FEEDINGS)}"
            )

    def validate_parallel_feeding(self):
        """In parallel mode only the LSTMs above the first layer read the context."""
        if self.attention_feeding == "parallel" and "lstm" not in self.decoder_layer_pattern[1:]:
            raise ValueError(
                f"attention_feeding='parallel' needs an 'lstm' above the first layer, which decoder_layer_pattern="
                f"{self.decoder_layer_pattern} does not have: nothing would read the source"
            )


__all__ = ["GnmtMoeConfig"]
