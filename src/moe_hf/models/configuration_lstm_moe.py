"""Configuration of the LSTM-MoE language model."""

from huggingface_hub.dataclasses import strict

from .configuration_moe import MoeConfig


@strict
class LstmMoeConfig(MoeConfig):
    r"""
    The language model of Shazeer et al. (2017), appendices C and D: embedding, layers, softmax.

    The paper's rows are spelt with `layer_pattern`: `["lstm", "moe", "lstm"]` with `num_experts=32` is MoE-32,
    `["lstm"] * 4` is 4xLSTM-512, `["lstm"]` with `lstm_hidden_size=2048` is LSTM-2048-512, and `num_experts=1`,
    `num_experts_per_tok=1`, `moe_intermediate_size=4096` is MoE-1-Wide, `num_experts=1024`, `num_expert_groups=16` is
    MoE-1024-h.

    Args:
        layer_pattern: the layers in order, each "lstm" or "moe", at least one of them "lstm".
        use_cache: whether to return the LSTM state outside of training.
        and all of `MoeConfig`.

    Raises:
        a validation error that names the argument and the values allowed.

    ```python
    >>> from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

    >>> model = LstmMoeForCausalLM(LstmMoeConfig(vocab_size=1000, hidden_size=64, num_experts=8))
    ```
    """

    model_type = "lstm_moe"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss"]
    base_model_tp_plan = {
        "layers.*.experts.up_proj": "colwise",
        "layers.*.experts.down_proj": "rowwise",
        "layers.*.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.experts.up_proj": "grouped_gemm",
        "layers.*.experts.down_proj": "grouped_gemm",
        "layers.*.experts": "ep_dispatch_experts",
    }

    layer_pattern: list[str] | tuple[str, ...] = ("lstm", "moe", "lstm")
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
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


__all__ = ["LstmMoeConfig"]
