"""Accepts names from the previous release for one more release, with a warning that gives the new name."""

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

# {old argument: new argument}, for keys of configuration files and options of the command line.
ARGUMENTS = {
    "words_per_batch": "tokens_per_batch",
    "eval_words_per_batch": "eval_tokens_per_batch",
    "batch_tokens": "tokens_per_batch",
    "references": "baselines",
    "reference": "baseline",  # in files that runs of the previous release wrote
}

# {old module: new module}, for modules that appeared in documentation and examples.
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
# {old module: {old name of a member: new name}}
MEMBERS = {
    "moe_hf.training.combined_batch": {"combine_batches": "balance_over_global_batch"},
    "moe_hf.training.reference": {
        "ReferenceArguments": "BaselineArguments",
        "train_reference": "train_baseline",
        "train_translation_reference": "train_translation_baseline",
    },
}


class OldModules(MetaPathFinder, Loader):
    """Finds the modules of `MODULES`, with the new module's members and a DeprecationWarning that names it."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module) -> None:
        old, new = module.__name__, MODULES[module.__name__]
        warnings.warn(f"{old} is now {new}; the next release removes the old path", DeprecationWarning, stacklevel=2)
        members = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in members.items() if not name.startswith("__")})
        for name, new_name in MEMBERS.get(old, {}).items():
            setattr(module, name, members[new_name])


def find_old_modules() -> None:
    """Let Python find the modules of `MODULES`, after all other finders."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())


def with_new_names(values: dict, known: Collection[str] | None = None, where: str = "") -> dict:
    """Return the values under the new names of their arguments, in the same order.

    Args:
        values: {argument: value}, with old or new names.
        known: the new names to translate to; other names stay unchanged. None: translate all names without a warning,
            for files that an earlier run wrote.
        where: start of the warning and of the error message, such as the file's name and a colon.

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
                raise InputError(f"{where}{name} is the old name of {new}, give {new} only")
            if known is not None:
                _warn(f"{where}{name}", new)
        renamed[new] = value
    return renamed


def with_new_options(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the command line with the new names of its options.

    Args:
        argv: the command line, without the program's name.
        parser: the parser of the new names.

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
                raise InputError(f"--{old} is the old name of --{new}, give --{new} only")
            _warn(f"--{old}", f"--{new}")
            word = f"--{new}{equals}{value}"
        options.append(word)
    return options


def _warn(old: str, new: str) -> None:
    logger.warning(f"{old} is now called {new}; the next release removes the old name")
