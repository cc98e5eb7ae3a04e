"""Several training runs one after the other, as one experiment that can be stopped and taken up again."""

import copy
import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError
from .arguments import DataArguments, MoeTrainingArguments
from .checkpoints import check_same_run
from .lm import load_text, train_lm
from .reference import ReferenceArguments, train_reference
from .runs import course_of_run
from .tokenizers import load_or_train_tokenizer

# What decides the tokenizer, with the arguments of its training in tokenizers.py.
TOKENIZER_ARGUMENTS = (
    *("tokenizer_kind", "vocab_size", "train_files", "max_train_lines"),
    *("dataset_name", "dataset_config_name", "train_split", "text_column"),
)


@dataclass
class SweepArguments:
    """What is varied."""

    variants: dict | str | None = field(
        default_factory=dict, metadata={"help": "{name: {argument: value}}; on the command line as JSON"}
    )
    references: dict | str | None = field(
        default_factory=dict,
        metadata={
            "help": "{name: {model_type: of Transformers, argument of its configuration or of the training: value}}: "
            "models beside ours; on the command line as JSON"
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "names of the variants and references to train (default: all)"}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "seeds, one run each"})

    def __post_init__(self):
        self.variants = _named(self.variants, "variants")
        self.references = _named(self.references, "references")

    def chosen(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """The variants and the references to train; InputError: none is given, or `only` names one that is not."""
        names = [*self.variants, *self.references]
        for name in self.only or []:
            if name not in names:
                raise InputError(f"only={name} is none of {', '.join(names)}")
        if not self.variants:
            raise InputError("variants is empty: name at least one model")
        variants, references = (
            {name: changes for name, changes in models.items() if not self.only or name in self.only}
            for models in (self.variants, self.references)
        )
        return variants, references


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
    """The same data for all runs, with a tokenizer that is trained once, into the folder `tokenizer` of `output_dir`.

    Raises:
        InputError: there is one that was trained otherwise, or it cannot be trained.
    """
    if data_args.tokenizer_name_or_path:
        return data_args
    folder = Path(training_args.output_dir) / "tokenizer"
    arguments = {name: getattr(data_args, name) for name in TOKENIZER_ARGUMENTS}
    if not folder.is_dir():
        print(f"{folder}: training", flush=True)
        text = load_text(data_args, "train")
        tokenizer = load_or_train_tokenizer(None, text, kind=data_args.tokenizer_kind, vocab_size=data_args.vocab_size)
        unfinished = folder.with_name(f"tokenizer-{os.getpid()}")
        tokenizer.save_pretrained(unfinished)
        check_same_run(str(unfinished), None, arguments)
        try:
            unfinished.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    check_same_run(str(folder), str(folder / "finished"), arguments)
    return replace(data_args, tokenizer_name_or_path=str(folder))


def train_variants(
    model_args,
    data_args,
    training_args,
    variants: dict[str, dict],
    seeds: list[int],
    train: Callable = train_lm,
) -> Iterator[tuple[str, int, Path]]:
    """Train one model for each variant and seed. Finished runs are kept, a run that was killed goes on.

    Args:
        model_args, data_args, training_args: what all runs have in common; each run gets a folder in `output_dir`.
        variants: {name: {argument of any of the three: value}}; the names become folders'.
        seeds: of the initial weights, the order of the data, the gating noise and the dropout.
        train: called with the three arguments of a run; `train_translation` for those of a translation model.

    Yields:
        name, seed and folder of each run, once it is finished.

    Raises:
        InputError: an argument that a model does not have, or a folder with a run of other arguments.
    """
    for seed in seeds:
        for name, changes in variants.items():
            given = (model_args, data_args, training_args)
            parts = [{key: value for key, value in changes.items() if key in vars(part)} for part in given]
            unknown = [argument for argument in changes if not any(argument in part for part in parts)]
            if unknown:
                raise InputError(f"variant {name!r}: no argument is named {unknown[0]!r}")
            if fixed := {"output_dir", "seed"} & changes.keys():
                raise InputError(f"variant {name!r}: {fixed.pop()} is not a variant's, each run has its own")
            run_model_args, run_data_args = replace(model_args, **parts[0]), replace(data_args, **parts[1])
            run_training_args = _of_one_run(training_args, name, seed)
            for argument, value in parts[2].items():
                setattr(run_training_args, argument, value)
            if _is_to_be_trained(run_model_args, run_data_args, run_training_args):
                train(run_model_args, run_data_args, run_training_args)
                gc.collect()
            yield name, seed, Path(run_training_args.output_dir)


def train_references(
    data_args: DataArguments, training_args: MoeTrainingArguments, references: dict[str, dict], seeds: list[int]
) -> Iterator[tuple[str, int, Path]]:
    """`train_variants` for models of Transformers' own, on as many tokens a step, in windows as long as they can take.

    Raises:
        InputError: a model that cannot be made, or whose windows do not divide the tokens of a step.
    """
    for seed in seeds:
        for name, changes in references.items():
            config = {argument: value for argument, value in changes.items() if not hasattr(training_args, argument)}
            model_args = ReferenceArguments(config)
            run_training_args = _of_one_run(training_args, name, seed)
            for argument in changes.keys() - config.keys():
                setattr(run_training_args, argument, changes[argument])
            window = model_args.config().max_position_embeddings
            tokens = training_args.per_device_train_batch_size * data_args.window_length
            if tokens % window:
                raise InputError(
                    f"reference {name!r}: its windows of {window} must divide the {tokens} tokens of a step"
                )
            run_training_args.per_device_train_batch_size = tokens // window
            run_data_args = replace(data_args, window_length=window, carry_state=False)
            if _is_to_be_trained(model_args, run_data_args, run_training_args):
                train_reference(model_args, run_data_args, run_training_args)
                gc.collect()
            yield name, seed, Path(run_training_args.output_dir)


def _of_one_run(training_args: MoeTrainingArguments, name: str, seed: int) -> MoeTrainingArguments:
    training_args = copy.copy(training_args)
    training_args.output_dir = str(Path(training_args.output_dir) / f"{name}-seed{seed}")
    training_args.seed = seed
    training_args.resume_from_checkpoint = "last"
    return training_args


def is_finished(folder: Path) -> bool:
    """Whether a run has saved its model and its last results."""
    return (folder / "eval_results.json").is_file() and (folder / "trainer_state.json").is_file()


def _is_to_be_trained(model_args, data_args, training_args: MoeTrainingArguments) -> bool:
    """Whether the run is not finished; InputError: there is a finished one of other arguments."""
    folder = Path(training_args.output_dir)
    if not is_finished(folder):
        print(f"{folder}: training", flush=True)
        return True
    check_same_run(str(folder), str(folder / "finished"), course_of_run(model_args, data_args, training_args))
    steps = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    if training_args.max_steps > 0 and training_args.max_steps != steps:
        raise InputError(f"max_steps={training_args.max_steps} differs from the {steps} of the finished run {folder}")
    print(f"{folder}: finished before")
    return False
