"""The parser of a subcommand's arguments, and the types of its options."""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..value_checks import LARGEST, MOST_BEAMS, NOT_NEGATIVE, POSITIVE, Range


class CommandParser(argparse.ArgumentParser):
    """Refuses wrong arguments with an `InputError` of one line, in place of usage lines and an exit.

    No text may be empty: an unset variable of a shell would stand for a folder or a name.
    """

    def error(self, message: str):
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[1], options, n=1)
            message = f"no argument is named {unknown[1]!r}" + (f", did you mean {near[0]!r}?" if near else "")
        raise InputError(message.removeprefix("argument "))

    def parse_args(self, args=None, namespace=None):
        arguments = super().parse_args(args, namespace)
        for name, value in vars(arguments).items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, str) and not part.strip():
                    self.error(f"{name} is empty")
        return arguments


def command_parser(name: str, description: str) -> CommandParser:
    """The parser of a subcommand's arguments, which names itself `moe-hf NAME`."""
    return CommandParser(
        prog=f"moe-hf {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def whole(least: int = 1, most: int = LARGEST) -> Callable[[str], int]:
    """A `type` for `add_argument`: whole numbers between two.

    Args:
        least: the smallest.
        most: the largest.
    """
    words = f"a whole number of at least {least}" + f" and at most {most}" * (most < LARGEST)
    return lambda text: _converted(text, int, Range(least=least, most=most), words)


def number(allowed: Range = Range()) -> Callable[[str], float]:
    """A `type` for `add_argument`: numbers of a range.

    Args:
        allowed: the range; by default every finite number.
    """
    return lambda text: _converted(text, float, allowed, f"a number, {allowed}")


def path(text: str) -> Path:
    """A `type` for `add_argument`: a path that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def size(text: str) -> str:
    """A `type` for `add_argument`: such as 5GB or 500MB."""
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", text, flags=re.I):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size above 0, such as 5GB or 500MB")
    return text


def _converted(text: str, kind: type, allowed: Range, words: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value not in allowed:
        raise argparse.ArgumentTypeError(f"{text!r} must be {words}")
    return value


count, beams, weight, amount = whole(), whole(most=MOST_BEAMS), number(NOT_NEGATIVE), number(POSITIVE)
