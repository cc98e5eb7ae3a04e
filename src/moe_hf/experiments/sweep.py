"""Trains several models one after the other, as one experiment that can be stopped and resumed."""

import copy
import gc
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data.arguments import DataArguments
from ..data.tokenizers import load_or_train_tokenizer
from ..errors import InputError
from ..training.arguments import MoeTrainingArguments
from ..training.checkpoints import check_same_run
from ..training.lm import load_text, train_lm
from ..training.runs import run_identity
from .baselines import BaselineArguments, train_baseline, train_translation_baseline

logger = logging.getLogger(__name__)

# Arguments that determine the tokenizer.
TOKENIZER_ARGUMENTS = (
    *("tokenizer_kind", "vocab_size", "train_files", "max_train_lines"),
    *("dataset_name", "dataset_config_name", "train_split", "text_column"),
)
# Arguments that may differ between the models of a sweep, besides model arguments. Other arguments take effect before
# the first model is built.
DATA_ARGUMENTS = ("train_pairs", "validation_pairs")
TRAINING_ARGUMENTS = {"max_steps": int, "warmup_steps": int, "learning_rate": float}


@dataclass
class SweepArguments:
    """The models and seeds of a sweep.

    Attributes:
        variants: {name: {argument: value}}, models of this package.
        baselines: {name: {argument: value}}, models of Transformers to compare with.
        only: names of the models to train; None for all.
        seeds: seeds; each model has one run for each seed.
    """

    variants: dict | str | None = field(
        default_factory=dict, metadata={"help": "{name: {argument: value}}; on the command line as JSON"}
    )
    baselines: dict | str | None = field(
        default_factory=dict,
        metadata={
            "help": "{name: {model_type: of Transformers, argument of its configuration or of the training: value}}: "
            "models to compare with; on the command line as JSON"
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the variants and baselines to train (default: all)"}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "seeds, one run each"})

    def __post_init__(self):
        self.variants = _named(self.variants, "variants")
        self.baselines = _named(self.baselines, "baselines")

    def check_names(self) -> None:
        """Check the names of the models.

        Raises:
            InputError: no model is given, two models have the same name, or `only` has an unknown name.
        """
        names = [*self.variants, *self.baselines]
        if both := self.variants.keys() & self.baselines.keys():
            raise InputError(f"baselines: {min(both)!r} is the name of a variant too")
        for name in self.only or []:
            if name not in names:
                raise InputError(f"only={name} is not one of {', '.join(names)}")
        if not names:
            raise InputError("variants is empty: name at least one model")


def _named(value: dict | str, argument: str) -> dict[str, dict]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{argument} is not valid JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(changes, dict) for changes in value.values()):
        raise InputError(f"{argument}={value!r} must be {{name: {{argument: value}}}}")
    for name in value:
        if not re.fullmatch(r"[\w.,=+-]+", name):
            raise InputError(f"{argument}: name {name!r} must consist of letters, digits and ._,=+-")
    return value


def with_shared_tokenizer(data_args: DataArguments, training_args: MoeTrainingArguments) -> DataArguments:
    """Return the data arguments with one tokenizer for all runs.

    The tokenizer is trained once, into the folder `tokenizer` of `output_dir`.

    Args:
        data_args: the data arguments of all runs.
        training_args: the training arguments of all runs.

    Raises:
        InputError: the folder has a tokenizer that was trained with other arguments, or the training fails.
    """
    if data_args.tokenizer_name_or_path:
        return data_args
    folder = Path(training_args.output_dir) / "tokenizer"
    arguments = {name: getattr(data_args, name) for name in TOKENIZER_ARGUMENTS}
    if not folder.is_dir():
        logger.info(f"{folder}: training")
        text = load_text(data_args, "train")
        tokenizer = load_or_train_tokenizer(None, text, kind=data_args.tokenizer_kind, vocab_size=data_args.vocab_size)
        unfinished = folder.with_name(f"tokenizer-{os.getpid()}")
        tokenizer.save_pretrained(unfinished)
        check_same_run(str(unfinished), None, arguments)
        try:
            unfinished.replace(folder)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    check_same_run(str(folder), str(folder / "finished"), arguments)
    return replace(data_args, tokenizer_name_or_path=str(folder))


@dataclass(frozen=True)
class Run:
    """One run of a sweep: `train(model_args, data_args, training_args)` writes its model to `folder`.

    Attributes:
        name: the model's name.
        seed: the run's seed.
        train: `train_lm`, or another function with the same arguments.
        model_args: the model arguments.
        data_args: the data arguments.
        training_args: the training arguments of this run, with its folder as `output_dir`.
    """

    name: str
    seed: int
    train: Callable
    model_args: object
    data_args: object
    training_args: MoeTrainingArguments

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.training_args.output_dir)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step of a language model, of all processes."""
        rows = self.training_args.per_device_train_batch_size * self.training_args.gradient_accumulation_steps
        return rows * self.training_args.world_size * self.data_args.window_length

    def is_finished(self) -> bool:
        """Return whether the folder has the model and its final results.

        Raises:
            InputError: the folder has the results of a run with other arguments.
        """
        folder = self.folder
        if not all((folder / file).is_file() for file in ("eval_results.json", "trainer_state.json")):
            return False
        identity = run_identity(self.model_args, self.data_args, self.training_args)
        check_same_run(str(folder), str(folder / "finished"), identity)
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        # max_steps, if it is given, decides the length of a training; the state has the epochs rounded up.
        name = "max_steps" if self.training_args.max_steps > 0 else "num_train_epochs"
        asked = getattr(self.training_args, name)
        if math.ceil(asked) != state[name]:
            raise InputError(f"{name}={asked} differs from the {state[name]} of the finished run {folder}")
        return True


def train_runs(runs: list[Run], only: list[str] | None = None) -> list[Run]:
    """Train all runs that are not finished yet; a run that was stopped is resumed.

    Args:
        runs: the whole sweep.
        only: names of the models to train; None for all.

    Returns:
        All runs that are finished afterwards, in their order.

    Raises:
        InputError: a folder has a run with other arguments. Finished runs are checked before any training.
    """
    are_finished = [run.is_finished() for run in runs]
    for run, is_finished in zip(runs, are_finished, strict=True):
        if only and run.name not in only:
            continue
        logger.info(f"{run.folder}: {'finished before' if is_finished else 'training'}")
        if not is_finished:
            run.train(run.model_args, run.data_args, run.training_args)
            gc.collect()
    return [run for run in runs if run.is_finished()]


def variant_runs(
    model_args,
    data_args,
    training_args: MoeTrainingArguments,
    variants: dict[str, dict],
    seeds: list[int],
    train: Callable = train_lm,
) -> list[Run]:
    """Return one run for each variant and seed.

    Args:
        model_args (object): model arguments that all runs share.
        data_args (object): data arguments that all runs share.
        training_args: training arguments that all runs share; each run gets a folder in `output_dir`.
        variants: {name: {argument: value}}, with model arguments, `DATA_ARGUMENTS` and `TRAINING_ARGUMENTS`. The names
            appear in the names of the runs' folders.
        seeds: seeds of the initial weights, the order of the data, the gating noise and the dropout.
        train: `train_translation` for translation models.

    Raises:
        InputError: a variant has an argument that cannot be varied.
    """
    runs = []
    for seed in seeds:
        for name, changes in variants.items():
            own = {key: value for key, value in changes.items() if key not in TRAINING_ARGUMENTS}
            of_data = {key: own.pop(key) for key in DATA_ARGUMENTS if key in own and hasattr(data_args, key)}
            if unknown := own.keys() - vars(model_args).keys():
                allowed = ", ".join([*DATA_ARGUMENTS, *TRAINING_ARGUMENTS])
                raise InputError(
                    f"variant {name!r}: {min(unknown)!r} is not an argument of the model, nor one of {allowed}"
                )
            run_training_args = _of_one_run(training_args, name, seed, changes)
            run_args = (replace(model_args, **own), replace(data_args, **of_data), run_training_args)
            runs.append(Run(name, seed, train, *run_args))
    return runs


def baseline_runs(
    data_args: DataArguments, training_args: MoeTrainingArguments, baselines: dict[str, dict], seeds: list[int]
) -> list[Run]:
    """Return the runs of language models of Transformers, with as many tokens per step, in windows of maximal length.

    Args:
        data_args: data arguments that all runs share.
        training_args: training arguments that all runs share; each run gets a folder in `output_dir`.
        baselines: {name: {argument: value}}, see `BaselineArguments`.
        seeds: as for `variant_runs`.

    Raises:
        InputError: a model cannot be built, or the length of its windows does not divide the tokens of a step.
    """
    runs = []
    for seed in seeds:
        for name, changes in baselines.items():
            model_args = _baseline(name, changes, data_args, training_args, translates=False)
            run_training_args = _of_one_run(training_args, name, seed, changes)
            window = model_args.config().max_position_embeddings
            tokens = training_args.per_device_train_batch_size * data_args.window_length
            if tokens % window:
                raise InputError(
                    f"baseline {name!r}: its windows of {window} must divide the {tokens} tokens of a step"
                )
            run_training_args.per_device_train_batch_size = tokens // window
            run_data_args = replace(data_args, window_length=window, carry_state=False)
            runs.append(Run(name, seed, train_baseline, model_args, run_data_args, run_training_args))
    return runs


def translation_baseline_runs(
    data_args, training_args: MoeTrainingArguments, baselines: dict[str, dict], seeds: list[int]
) -> list[Run]:
    """Return the runs of translation models of Transformers, on the same batches as in `variant_runs`.

    Args:
        data_args (object): data arguments that all runs share.
        training_args: training arguments that all runs share; each run gets a folder in `output_dir`.
        baselines: {name: {argument: value}}, see `BaselineArguments`.
        seeds: as for `variant_runs`.

    Raises:
        InputError: a model cannot be built, is not an encoder-decoder model, or has an argument that cannot be varied.
    """
    runs = []
    for seed in seeds:
        for name, changes in baselines.items():
            model_args = _baseline(name, changes, data_args, training_args, translates=True)
            run_training_args = _of_one_run(training_args, name, seed, changes)
            runs.append(Run(name, seed, train_translation_baseline, model_args, data_args, run_training_args))
    return runs


def _baseline(name: str, changes: dict, data_args, training_args, translates: bool) -> BaselineArguments:
    """Return the model's arguments; invalid arguments are refused here, before any training."""
    own = {key: value for key, value in changes.items() if key not in TRAINING_ARGUMENTS}
    if wrong := own.keys() & (vars(training_args).keys() | vars(data_args).keys()):
        allowed = ", ".join(TRAINING_ARGUMENTS)
        raise InputError(f"baseline {name!r}: {min(wrong)!r} is not an argument of the model, nor one of {allowed}")
    model_args = BaselineArguments(own)
    try:
        model_args.check(translates)
    except InputError as error:
        raise InputError(f"baseline {name!r}: {error}") from error
    return model_args


def _of_one_run(training_args: MoeTrainingArguments, name: str, seed: int, changes: dict) -> MoeTrainingArguments:
    training_args = copy.copy(training_args)
    training_args.output_dir = str(Path(training_args.output_dir) / f"{name}-seed{seed}")
    training_args.seed = seed
    training_args.resume_from_checkpoint = "last"
    for argument, kind in TRAINING_ARGUMENTS.items():
        if argument in changes:
            setattr(training_args, argument, _number(kind, changes[argument], f"{name!r}: {argument}"))
    return training_args


def _number(kind: type, value, argument: str) -> int | float:
    """Return the value as an int or float; YAML reads 1e-3 as text."""
    try:
        number = kind(float(value))
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or number != float(value):
        raise InputError(f"{argument}={value!r} must be of type {kind.__name__}")
    return number
