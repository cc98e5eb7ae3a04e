"""The errors that end a command with one line, and how a command does so."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input is at fault; the message is one line: the argument or file, the value seen, what is allowed."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message says at which step and what was kept."""


def run_command(command: Callable[[], dict | None]) -> int:
    """Call `command` and print the metrics that it returns, or its error as one line on standard error.

    Returns:
        the exit status, 1 after an error.
    """
    try:
        metrics = command()
    except (InputError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in (metrics or {}).items():
        print(f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:.4f}")
    return 0
