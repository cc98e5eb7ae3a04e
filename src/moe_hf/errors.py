"""The errors that end a command with one line, and how a command does so."""

import signal
import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input is at fault; the message is one line: the argument or file, the value seen, what is allowed."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message says at which step and what was kept."""


class InterruptedRun(RuntimeError):
    """A signal ended a training early; the message says after which step, and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def run_command(command: Callable[[], dict | None]) -> int:
    """Call `command` and print the metrics that it returns, or its error as one line on standard error.

    Returns:
        the exit status: 1 after an error, and as in a shell 128 and the signal's number after one, 130 for Ctrl-C.
    """
    try:
        metrics = command()
    except (InputError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InterruptedRun as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    for name, value in (metrics or {}).items():
        print(f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:.4f}")
    return 0
