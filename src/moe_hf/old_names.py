"""Names of the release before, which work for one more, each with a warning that tells the new one."""

import argparse
import logging
from collections.abc import Collection

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
