"""A model of Transformers' own beside ours: the same text, tokenizer, tokens per step and optimizer."""

from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError
from .arguments import DataArguments, MoeTrainingArguments, TranslationTrainingArguments
from .lm import train_lm
from .trainer import LmTrainer
from .translation import train_translation
from .translation_arguments import TranslationDataArguments
from .translation_trainer import TranslationTrainer


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


def train_translation_reference(
    model_args: ReferenceArguments, data_args: TranslationDataArguments, training_args: TranslationTrainingArguments
) -> tuple[TranslationTrainer, dict[str, float | str]]:
    """`train_translation` for another encoder-decoder model, such as Marian's Transformer, from random weights.

    Its loss is ours: `label_smoothing` may stand among the arguments of its configuration, which keeps it.

    Raises:
        InputError: something in the arguments or the data is wrong, or the model is not one that translates.
    """

    def new_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        special |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
        config = model_args.config(vocab_size=len(tokenizer), **special)
        try:
            return AutoModelForSeq2SeqLM.from_config(config)
        except ValueError as error:
            raise InputError(
                f"reference={model_args.reference} is no encoder-decoder model ({str(error).partition(':')[0]})"
            ) from error

    return train_translation(model_args, data_args, training_args, new_model)
