"""A model of Transformers' own beside ours: the same text, tokenizer, tokens per step and optimizer."""

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .arguments import DataArguments, MoeTrainingArguments
from .lm import train_lm
from .trainer import LmTrainer


@dataclass
class ReferenceArguments:
    """A model of Transformers: {"model_type": "gpt2", "n_embd": 64, ...}; the vocabulary is the tokenizer's."""

    reference: dict = field(default_factory=dict)
    model_name_or_path: str | None = None

    def config(self, **vocabulary) -> PreTrainedConfig:
        """Its configuration; InputError: there is no such model, or it has no such arguments."""
        try:
            return AutoConfig.for_model(**self.reference, **vocabulary)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"reference={self.reference} is no model: {' '.join(str(error).split())[:300]}"
            ) from error


def train_reference(
    model_args: ReferenceArguments, data_args: DataArguments, training_args: MoeTrainingArguments
) -> tuple[LmTrainer, dict[str, float]]:
    """`train_lm` for another causal language model, such as GPT-2, from random weights.

    It sees each window by itself, since only an LSTM's state can be carried: choose a `window_length` that is fair.

    Args:
        data_args, training_args: as for `train_lm`, with carry_state=False.

    Raises:
        InputError: something in the arguments or the data is wrong.
    """
    if data_args.carry_state:
        raise InputError("carry_state=True needs an LSTM, a reference model is trained on each window by itself")

    def new_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return AutoModelForCausalLM.from_config(model_args.config(vocab_size=len(tokenizer), **special))

    return train_lm(model_args, data_args, training_args, new_model)
