"""Trains a baseline model of Transformers with the same text, tokenizer, tokens per step and optimizer."""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.arguments import DataArguments, TranslationDataArguments
from ..errors import InputError
from ..training.arguments import MoeTrainingArguments, TranslationTrainingArguments
from ..training.lm import train_lm
from ..training.lm_trainer import LmTrainer
from ..training.translation import train_translation
from ..training.translation_trainer import TranslationTrainer

# Arguments that a configuration stores without having an attribute for them.
NOTES = ("label_smoothing", "attn_implementation")


@dataclass
class BaselineArguments:
    """A model of Transformers, with the tokenizer's vocabulary.

    Attributes:
        baseline: {"model_type": "gpt2", "n_embd": 64, ...}.
        model_name_or_path: always None, because the model starts from random weights.
    """

    baseline: dict = field(default_factory=dict)
    model_name_or_path: str | None = None

    def config(self, **vocabulary) -> PreTrainedConfig:
        """Return the model's configuration.

        Args:
            **vocabulary (Any): further arguments of the configuration, such as vocab_size.

        Raises:
            InputError: Transformers does not have the model, or the model does not have an argument.
        """
        try:
            return AutoConfig.for_model(**self.baseline, **vocabulary)
        except (TypeError, ValueError) as error:
            raise self._error(f"is not a model: {' '.join(str(error).split())[:300]}") from error

    def check(self, translates: bool) -> None:
        """Check the arguments by building the model without allocating memory.

        Args:
            translates: whether the model must be an encoder-decoder model.

        Raises:
            InputError: the model cannot be built, is of the wrong kind, or does not have an argument.
        """
        config = self.config()
        known = BaselineArguments({"model_type": config.model_type}).config()
        for name in self.baseline:
            if not hasattr(known, name) and name not in NOTES:  # the configuration would store it silently
                raise self._error(f"is not a model: {name!r} is not an argument of {config.model_type}")
        smoothing = self.baseline.get("label_smoothing", 0.0)
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise InputError(f"label_smoothing={smoothing!r} must be a number of at least 0 and below 1")
        if translates and not config.is_encoder_decoder:
            raise self._error("is not an encoder-decoder model")
        auto_class = AutoModelForSeq2SeqLM if translates else AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = auto_class.from_config(config)
        except (TypeError, ValueError, AssertionError) as error:
            raise self._error(f"cannot be made: {str(error).partition(chr(10))[0][:300]}") from error
        if translates and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise self._error("cannot be trained here: it does not shift labels; marian, bart, t5 and others do")

    def _error(self, reason: str) -> InputError:
        return InputError(f"baseline={self.baseline} {reason}")


def train_baseline(
    model_args: BaselineArguments, data_args: DataArguments, training_args: MoeTrainingArguments
) -> tuple[LmTrainer, dict[str, float]]:
    """Run `train_lm` for another causal language model, such as GPT-2, from random weights.

    The model sees each window separately, because only an LSTM's state can be carried. Choose a `window_length` that
    makes the comparison fair.

    Args:
        model_args: the model.
        data_args: as for `train_lm`, with carry_state=False.
        training_args: as for `train_lm`.

    Raises:
        InputError: an argument or the data are invalid.
    """
    if data_args.carry_state:
        raise InputError("carry_state=True needs an LSTM, a baseline model is trained on each window by itself")

    def new_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return AutoModelForCausalLM.from_config(model_args.config(vocab_size=len(tokenizer), **special))

    return train_lm(model_args, data_args, training_args, new_model)


def train_translation_baseline(
    model_args: BaselineArguments, data_args: TranslationDataArguments, training_args: TranslationTrainingArguments
) -> tuple[TranslationTrainer, dict[str, float | str]]:
    """Run `train_translation` for another encoder-decoder model that shifts labels, such as Marian or BART.

    The loss is computed as for this package's translation models. `label_smoothing` can be given with the arguments of
    the configuration.

    Args:
        model_args: the model.
        data_args: as for `train_translation`.
        training_args: as for `train_translation`.

    Raises:
        InputError: an argument or the data are invalid.
    """

    def new_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        special |= {"decoder_start_token_id": tokenizer.bos_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
        return AutoModelForSeq2SeqLM.from_config(model_args.config(vocab_size=len(tokenizer), **special))

    return train_translation(model_args, data_args, training_args, new_model)
