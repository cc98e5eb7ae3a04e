"""Trains models from Python, with the commands' arguments as keywords."""

from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments, TranslationDataArguments
from . import lm, translation
from .arguments import (
    LmModelArguments,
    MoeTrainingArguments,
    TranslationModelArguments,
    TranslationTrainingArguments,
    parse_arguments,
)
from .lm_trainer import LmTrainer
from .translation_trainer import TranslationTrainer


def train_lm(config: str | Path | None = None, **keywords: Any) -> tuple[LmTrainer, dict[str, float]]:
    """Train a language model, as `moe-hf train-lm` does.

    ```python
    >>> trainer, metrics = moe_hf.train_lm(train_files="text.txt", output_dir="runs/lm", num_experts=8)
    ```

    Args:
        config: a YAML file of arguments; keywords override it.
        **keywords: arguments of `moe-hf train-lm`, such as train_files, output_dir, hidden_size and learning_rate.

    Returns:
        the trainer, whose `model` is trained, and the metrics of the last evaluation (empty without validation text).

    Raises:
        InputError: an argument or the data is wrong.
        NonFiniteLossError: the training diverged.
    """
    return lm.train_lm(*_arguments(config, keywords, (LmModelArguments, DataArguments, MoeTrainingArguments)))


def train_translation(
    config: str | Path | None = None, **keywords: Any
) -> tuple[TranslationTrainer, dict[str, float | str]]:
    """Train a translation model, as `moe-hf train-translation` does.

    Args:
        config: a YAML file of arguments; keywords override it.
        **keywords: arguments of `moe-hf train-translation`, such as train_source_files and train_target_files.

    Returns:
        the trainer, whose `model` is trained, and the metrics of the last evaluation (empty without validation pairs).

    Raises:
        InputError: an argument or the data is wrong.
        NonFiniteLossError: the training diverged.
    """
    classes = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)
    return translation.train_translation(*_arguments(config, keywords, classes))


def _arguments(config: str | Path | None, keywords: dict, classes: tuple) -> tuple:
    return parse_arguments([] if config is None else [str(config)], classes, keywords=keywords)
