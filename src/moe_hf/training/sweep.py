"""Several training runs one after the other, as one experiment that can be stopped and taken up again."""

import copy
import gc
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError
from .arguments import DataArguments, ModelArguments, MoeTrainingArguments
from .checkpoints import check_same_run
from .lm import train_lm
from .runs import course_of_run


@dataclass
class SweepArguments:
    """What is varied."""

    variants: dict | str | None = field(
        default_factory=dict, metadata={"help": "{name: {model argument: value}}; on the command line as JSON"}
    )
    only: list[str] | None = field(default=None, metadata={"help": "names of the variants to train (default: all)"})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "seeds, one run each"})

    def __post_init__(self):
        if isinstance(self.variants, str):
            try:
                self.variants = json.loads(self.variants)
            except json.JSONDecodeError as error:
                raise InputError(f"variants is not valid JSON: {error}") from error
        if not isinstance(self.variants, dict) or not all(isinstance(v, dict) for v in self.variants.values()):
            raise InputError(f"variants={self.variants!r} must be {{name: {{model argument: value}}}}")

    def chosen(self) -> dict[str, dict]:
        """The variants to train; InputError: there are none, or `only` names one that is not there."""
        for name in self.only or []:
            if name not in self.variants:
                raise InputError(f"only={name} is none of the variants {', '.join(self.variants)}")
        chosen = {name: changes for name, changes in self.variants.items() if not self.only or name in self.only}
        if not chosen:
            raise InputError("variants is empty: name at least one model")
        return chosen


def train_variants(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MoeTrainingArguments,
    variants: dict[str, dict],
    seeds: list[int],
) -> Iterator[tuple[str, int, Path]]:
    """Train one model for each variant and seed. Finished runs are kept, a run that was killed goes on.

    Args:
        model_args, data_args, training_args: what all runs have in common; each run gets a folder in `output_dir`.
        variants: {name: {model argument: value}}.
        seeds: of the initial weights, the order of the windows, the gating noise and the dropout.

    Yields:
        name, seed and folder of each run, once it is finished.

    Raises:
        InputError: a name that does not fit a folder, an argument that a model does not have, or a folder with a run
            of other arguments.
    """
    for seed in seeds:
        for name, changes in variants.items():
            if not re.fullmatch(r"[\w.,=+-]+", name):
                raise InputError(f"variant name {name!r} must consist of letters, digits and ._,=+-")
            unknown = [argument for argument in changes if argument not in vars(model_args)]
            if unknown:
                raise InputError(f"variant {name!r}: no model argument is named {unknown[0]!r}")
            folder = Path(training_args.output_dir) / f"{name}-seed{seed}"
            run_model_args = replace(model_args, **changes)
            run_training_args = copy.copy(training_args)
            run_training_args.output_dir = str(folder)
            run_training_args.seed = seed
            run_training_args.resume_from_checkpoint = "last"
            if is_finished(folder):
                _check_finished(folder, run_model_args, data_args, run_training_args)
                print(f"{folder}: finished before")
            else:
                print(f"{folder}: training", flush=True)
                train_lm(run_model_args, copy.copy(data_args), run_training_args)
                gc.collect()
            yield name, seed, folder


def is_finished(folder: Path) -> bool:
    """Whether a run has saved its model and its last results."""
    return (folder / "eval_results.json").is_file() and (folder / "trainer_state.json").is_file()


def _check_finished(folder: Path, model_args, data_args, training_args) -> None:
    check_same_run(str(folder), str(folder / "finished"), course_of_run(model_args, data_args, training_args))
    steps = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    if training_args.max_steps > 0 and training_args.max_steps != steps:
        raise InputError(f"max_steps={training_args.max_steps} differs from the {steps} of the finished run {folder}")
