"""Names of the release before, which work for one more, each with a warning that tells the new one."""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Collection
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

from .errors import InputError

logger = logging.getLogger(__name__)

# Old argument -> new argument: keys of configuration files, and options with two dashes before them.
ARGUMENTS = {
    "words_per_batch": "tokens_per_batch",
    "eval_words_per_batch": "eval_tokens_per_batch",
    "batch_tokens": "tokens_per_batch",
    "references": "baselines",
    "reference": "baseline",  # of the files that a run leaves
}

# Old module -> new module, of those that the documentation and the examples named.
MODULES = {
    "moe_hf.evaluation.communication": "moe_hf.distributed.communication",
    "moe_hf.evaluation.routing_statistics": "moe_hf.routing.statistics",
    "moe_hf.evaluation.sharding_plan": "moe_hf.distributed.plan",
    "moe_hf.training.combined_batch": "moe_hf.distributed.global_batch",
    "moe_hf.training.demo_corpus": "moe_hf.demo.text_corpus",
    "moe_hf.training.evaluate": "moe_hf.evaluation.language_model",
    "moe_hf.training.evaluate_translation": "moe_hf.evaluation.translation_model",
    "moe_hf.training.number_words_en": "moe_hf.demo.number_words_en",
    "moe_hf.training.reference": "moe_hf.experiments.baselines",
    "moe_hf.training.tokenizers": "moe_hf.data.tokenizers",
    "moe_hf.training.translation_demo_corpus": "moe_hf.demo.pair_corpus",
    "moe_hf.training.windows": "moe_hf.data.windows",
    "moe_hf.translation": "moe_hf.translator",
}
# What such a module has under another name today: old -> new.
MEMBERS = {
    "moe_hf.training.combined_batch": {"combine_batches": "balance_over_global_batch"},
    "moe_hf.training.reference": {
        "ReferenceArguments": "BaselineArguments",
        "train_reference": "train_baseline",
        "train_translation_reference": "train_translation_baseline",
    },
}


class OldModules(MetaPathFinder, Loader):
    """Finds the modules of `MODULES`: each has the members of the new one, and a DeprecationWarning names that."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module) -> None:
        old, new = module.__name__, MODULES[module.__name__]
        warnings.warn(f"{old} is now {new}; the old path goes with the next release", DeprecationWarning, stacklevel=2)
        members = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in members.items() if not name.startswith("__")})
        for name, new_name in MEMBERS.get(old, {}).items():
            setattr(module, name, members[new_name])


def find_old_modules() -> None:
    """Let Python find the modules of `MODULES`, after all others."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())


def with_new_names(values: dict, known: Collection[str] | None = None, where: str = "") -> dict:
    """The values under the new names of their arguments, in the same order.

    Args:
        values: of arguments, by old or new names.
        known: the new names that are arguments here; others stay as they are. None: all of them, without a warning, as
            in the files that an earlier run has left.
        where: what the warning and the error start with, such as the file's name and a colon.

    Returns:
        a new dictionary.

    Raises:
        InputError: an argument has a value under both of its names.
    """
    renamed = {}
    for name, value in values.items():
        new = name if known is not None and name in known else ARGUMENTS.get(name, name)
        if known is not None and new not in known:
            new = name
        if new != name:
            if new in values or new in renamed:
                raise InputError(f"{where}{name} and {new} are two names of one argument, give {new} alone")
            if known is not None:
                _warn(f"{where}{name}", new)
        renamed[new] = value
    return renamed


def with_new_options(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line under the new names of its options.

    Args:
        argv: without the program's name.
        parser: which knows the new names.

    Raises:
        InputError: an argument is given under both of its names.
    """
    known = {option.removeprefix("--") for option in parser._option_string_actions}
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    options = []
    for word in argv:
        option, equals, value = word.partition("=")
        old = option.removeprefix("--").replace("-", "_") if option.startswith("--") else None
        new = ARGUMENTS.get(old)
        if new in known and old not in known:
            if new in given:
                raise InputError(f"--{old} and --{new} are two names of one argument, give --{new} alone")
            _warn(f"--{old}", f"--{new}")
            word = f"--{new}{equals}{value}"
        options.append(word)
    return options


def _warn(old: str, new: str) -> None:
    logger.warning(f"{old} is now called {new}; the old name goes with the next release")
