"""Reads the model and the optimizer that a training's configuration file describes, for `moe-hf plan` and `table`."""

import dataclasses
from pathlib import Path

from ..data.arguments import DataArguments, TranslationDataArguments
from ..data.paths import expand_path
from ..distributed.plan import OPTIMIZERS
from ..errors import InputError
from ..loading import family_of, load_config
from ..models.configuration_gnmt_moe import GnmtMoeConfig
from ..models.configuration_lstm_moe import LstmMoeConfig
from ..models.configuration_moe import MoeConfig
from ..yaml_file import read_yaml
from .arguments import (
    LmModelArguments,
    MoeTrainingArguments,
    TranslationModelArguments,
    TranslationTrainingArguments,
)

PLANNED_AS = {"adamw_torch": "adam", "adamw_torch_fused": "adam", "factored_adam": "factored_adam"}
LM_ARGUMENTS = (LmModelArguments, DataArguments, MoeTrainingArguments)
TRANSLATION_ARGUMENTS = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def read_config(file: Path | None, changes: dict | None = None) -> MoeConfig:
    """Read the model that a configuration file of `moe-hf train-lm` or `moe-hf train-translation` describes.

    Args:
        file: the YAML file; None for the defaults of `LstmMoeConfig`.
        changes: arguments that replace the file's.

    Raises:
        InputError: the file is missing or not a mapping, has a name that is no argument of either command, or names
            a model that cannot be read; or the configuration is refused.
    """
    values = {} if file is None else read_yaml(file)
    of_lm, of_translation = _names(LM_ARGUMENTS), _names(TRANSLATION_ARGUMENTS)
    is_translation = bool(values.keys() & (of_translation - of_lm))
    if unknown := values.keys() - (of_translation if is_translation else of_lm):
        command = "train-translation" if is_translation else "train-lm"
        raise InputError(f"{file}: no argument of moe-hf {command} is named {min(unknown)!r}")
    config_class = GnmtMoeConfig if is_translation else LstmMoeConfig
    given = {name: values[name] for name in values.keys() & _names([config_class])} | (changes or {})
    if path := values.get("model_name_or_path"):
        path = expand_path(path, "model_name_or_path")
        family_of(path, "model_name_or_path")  # refuses models of other packages
        return load_config(path, **given)
    if file is not None:
        data = TranslationDataArguments if is_translation else DataArguments
        given = {"vocab_size": data.vocab_size} | given
    try:
        return config_class(**given)
    except Exception as error:  # the library wraps the checks' errors
        raise InputError(" ".join(str(error).split())) from error


def read_optimizer(file: Path | None, optimizer: str | None, expert_gradients: str | None) -> tuple[str, str]:
    """Return the optimizer and the kind of experts' gradients for `plan_sharding`: the given ones, or else the file's.

    Args:
        file: the YAML file, as for `read_config`; None for factored Adam and dense gradients.
        optimizer: the given optimizer, or None.
        expert_gradients: the given kind of gradients, or None.

    Raises:
        InputError: no optimizer is given, and the file's has no plan.
    """
    values = {"optim": "factored_adam"} if file is None else read_yaml(file)
    optim = str(values.get("optim", "adamw_torch"))  # without optim, the Trainer takes an AdamW
    if optimizer is None and optim not in PLANNED_AS:
        raise InputError(f"optim={optim!r} of {file} has no plan, give --optimizer {' or '.join(OPTIMIZERS)}")
    return optimizer or PLANNED_AS[optim], expert_gradients or values.get("expert_gradients", "dense")


def _names(classes) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls)}
