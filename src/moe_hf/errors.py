"""The errors that end a command with one line, and how a command does so."""

import os
import select
import signal
import sys
from collections.abc import Callable


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    Of a configuration's check that is the check's own message, which the library wraps in an error of its own.
    """
    cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else None
    return str(cause or error).strip().partition("\n")[0]


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

    Args:
        command: called without arguments.

    Returns:
        The exit status, as in a shell: 0; 1 after an error; 128 and the signal's number after a signal, such as 130
        for Ctrl-C, or 141 when the reader of the output, such as `head`, has read enough.
    """
    try:
        for name, value in (command() or {}).items():
            print(f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:.4f}")
        sys.stdout.flush()
    except (InputError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InterruptedRun as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _nobody_reads_output():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return 128 + signal.SIGPIPE
    return 0


def _nobody_reads_output() -> bool:
    """Whether it is the standard output that broke, and not a pipe to some other process."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # which reports errors and nothing else
    return bool(poll.poll(0))
