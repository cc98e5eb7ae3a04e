"""Configuration of the GNMT-MoE translation model."""

# Imported first: with another Transformers, the imports below would fail with an error that does not name the version.
from .versions import TRANSFORMERS  # noqa: F401

# isort: split
from huggingface_hub.dataclasses import strict

from .configuration_moe import MoeConfig

ATTENTION_TYPES = ("product", "additive")
ATTENTION_FEEDINGS = ("recurrent", "input", "parallel")


@strict
class GnmtMoeConfig(MoeConfig):
    r"""
    The translation model of Shazeer et al. (2017), appendices E and G: a small GNMT with MoE layers in both stacks.

    The paper's models have `lstm_hidden_size=2048`, and `num_experts=32` flat or more experts with
    `num_expert_groups`. The other values are the defaults below; configs/translation has one file for each model. The
    arguments of `MoeConfig` are allowed too; dropout, expert size and loss weights default to the paper's values for
    translation.

    Attributes:
        encoder_layer_pattern: the encoder's layers in order, each "lstm" or "moe", with at least one "lstm".
        decoder_layer_pattern: the decoder's layers in order. The first is "lstm" and queries the attention.
        encoder_bidirectional_first: whether the encoder's first layer reads the source in both directions, each with
            `hidden_size` outputs. This layer must be "lstm". A following LSTM reads the concatenation of both
            directions, and a following MoE layer reads their mean.
        attention_type: "product" (the paper's, two matrix products) or "additive" (GNMT's).
        attention_feeding: how the context is fed to the decoder. "recurrent" (GNMT): the query is the bottom LSTM's
            output at the previous step, and all LSTMs of the decoder read the context. "input": as "recurrent", but
            the LSTMs above the bottom one read a context whose query is the bottom LSTM's output at the same step.
            "parallel": the query is the bottom LSTM's output at the same step, and only the LSTMs above it read the
            context, so the bottom layer runs as one call.
        deep_output: whether the softmax reads tanh(W [h, y, context] + b), with the top layer's output h and the
            embedding y of the preceding target token (Pascanu et al., 2014), instead of h. It is not in the paper.
            With `tie_word_embeddings`, h then need not resemble an embedding.
        share_embeddings: whether source and target tokens share one embedding. With `tie_word_embeddings`, the softmax
            shares the target's embedding too.
        use_cache: whether to return the decoder's state outside of training.
        decoder_start_token_id: the token before the first target token; training from `labels` needs it.

    Raises:
        StrictDataclassClassValidationError: a value is not allowed; the message names the argument, the value and what
            is allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.

    ```python
    >>> from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration

    >>> model = GnmtMoeForConditionalGeneration(GnmtMoeConfig(vocab_size=1000, hidden_size=64, num_experts=8))
    ```
    """

    model_type = "gnmt_moe"
    # The Trainer leaves these out of predictions. Router logits have one row per position, not per text.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "aux_loss",
        "encoder_last_hidden_state",
        "encoder_router_logits",
        "decoder_router_logits",
    ]
    base_model_fsdp_plan = {}  # encoder and decoder have the plans; here they would get a wrong prefix

    dropout: float | int = 0.4
    moe_intermediate_size: int = 2048
    importance_loss_coef: float | int = 0.01
    load_loss_coef: float | int = 0.01
    encoder_layer_pattern: list[str] | tuple[str, ...] = ("lstm", "lstm", "moe", "lstm")
    decoder_layer_pattern: list[str] | tuple[str, ...] = ("lstm", "moe", "lstm")
    encoder_bidirectional_first: bool = True
    attention_type: str = "product"
    attention_feeding: str = "recurrent"
    deep_output: bool = False
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
        """Number of encoder layers, from `encoder_layer_pattern`."""
        return len(self.encoder_layer_pattern)

    @property
    def decoder_layers(self) -> int:
        """Number of decoder layers, from `decoder_layer_pattern`."""
        return len(self.decoder_layer_pattern)

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers, which equals the number of layers in `layer_types` and in a cache."""
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
        """Layer types for Transformers' caches: "lstm" for every decoder layer, including MoE layers.

        A layer and its state therefore have the same index. The cache layer of a MoE layer stays empty. It is not of
        the library's type "moe", because that type refuses to report its length, and an `EncoderDecoderCache` asks for
        it.
        """
        return ["lstm"] * self.decoder_layers

    def get_text_config(self, decoder=None, encoder=None) -> "GnmtMoeConfig":
        """Return this configuration itself: the library would return a copy with renamed "decoder" arguments."""
        return self

    def validate_layer_type(self):
        """Check the layers' names and order; replaces the library's check, which only knows its own names."""
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
        """Check the names of attention and feeding."""
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
        """Check that an LSTM reads the context: with parallel feeding, only LSTMs above the first layer do."""
        if self.attention_feeding == "parallel" and "lstm" not in self.decoder_layer_pattern[1:]:
            raise ValueError(
                f"attention_feeding='parallel' needs an 'lstm' above the first layer, which decoder_layer_pattern="
                f"{self.decoder_layer_pattern} does not have: nothing would read the source"
            )


__all__ = ["GnmtMoeConfig"]
