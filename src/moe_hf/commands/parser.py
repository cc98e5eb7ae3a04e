"""The parser of a subcommand's arguments, and the types of its options."""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..value_checks import LARGEST, LENGTH_EXPONENT, LENGTH_WEIGHT, MOST_BEAMS, NOT_NEGATIVE, POSITIVE, Range


class CommandParser(argparse.ArgumentParser):
    """Raises an `InputError` of one line for wrong arguments, where argparse prints its usage and exits.

    Empty text is refused: it is usually an unset shell variable in place of a folder or a name.
    """

    def error(self, message: str):
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[1], options, n=1)
            message = f"no argument is named {unknown[1]!r}" + (f", did you mean {near[0]!r}?" if near else "")
        # argparse writes `argument -o/--output: message`; the message from `_converted` starts with "=value".
        message = re.sub(r"^argument (?:-\w/)?-*([\w-]+): =", r"\1=", message)
        choice = r"^argument (?:-\w/)?-*([\w-]+): invalid choice: (.*) \(choose from (.*)\)$"
        message = re.sub(choice, r"\1=\2 is not known, use one of \3", message)
        raise InputError(message.removeprefix("argument "))

    def parse_args(self, args=None, namespace=None):
        arguments = super().parse_args(args, namespace)
        typed = {
            action.dest: max(action.option_strings, key=len).lstrip("-")
            for action in self._actions
            if action.option_strings
        }
        for name, value in vars(arguments).items():
            name = typed.get(name, name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, str) and not part.strip():
                    self.error(f"{name}='' is empty")
        return arguments


def command_parser(name: str, description: str) -> CommandParser:
    """Return the parser of a subcommand's arguments, with the program name `moe-hf NAME`."""
    return CommandParser(
        prog=f"moe-hf {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def whole(least: int = 1, most: int = LARGEST) -> Callable[[str], int]:
    """Return a `type` for `add_argument`: whole numbers in a range.

    Args:
        least: the smallest number allowed.
        most: the largest number allowed.
    """
    return lambda text: _converted(text, int, Range(least=least, most=most))


def number(allowed: Range = Range()) -> Callable[[str], float]:
    """Return a `type` for `add_argument`: numbers in a range.

    Args:
        allowed: the range; by default every finite number.
    """
    return lambda text: _converted(text, float, allowed)


def path(text: str) -> Path:
    """A `type` for `add_argument`: a path that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("='' is empty")
    return Path(text)


def size(text: str) -> str:
    """A `type` for `add_argument`: a size such as 5GB or 500MB."""
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", text, flags=re.I):
        raise argparse.ArgumentTypeError(f"={text!r} must be a size above 0, such as 5GB or 500MB")
    return text


def _converted(text: str, kind: type, allowed: Range):
    try:
        value = kind(text)
    except ValueError as error:
        words = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"={text!r} must be {words}, {allowed}") from error
    if value not in allowed:
        words = "a number of " if kind is float and allowed == NOT_NEGATIVE else ""
        raise argparse.ArgumentTypeError(f"={text} must be {words}{allowed}")
    return value


count, beams, weight, amount = whole(), whole(most=MOST_BEAMS), number(NOT_NEGATIVE), number(POSITIVE)
length_weight, length_exponent = number(LENGTH_WEIGHT), number(LENGTH_EXPONENT)
