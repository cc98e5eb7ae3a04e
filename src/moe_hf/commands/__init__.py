"""What can be done from a command line: one module for each subcommand of `moe-hf`, and here what they share."""

import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..errors import InputError, InterruptedRun, NonFiniteLossError
from .parser import command_parser as command_parser


def run_command(command: Callable[[], dict | None]) -> int:
    """Call `command` and print the metrics that it returns, or its error as one line on standard error.

    Meanwhile the package's messages are printed too, see `printed_messages`.

    Returns:
        the exit status: 1 after an error, and as in a shell 128 and the signal's number after one: 130 for Ctrl-C, 141
        when whoever read the output, such as `head`, has read enough.
    """
    try:
        with printed_messages():
            metrics = command() or {}
        for name, value in metrics.items():
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


@contextmanager
def printed_messages() -> Iterator[None]:
    """Print what the package logs, a line each: messages on standard output, warnings on standard error."""
    logger, handler = logging.getLogger("moe_hf"), _PrintHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _PrintHandler(logging.Handler):
    """Prints a message on a line of its own: clears progress bars before it and draws them again after it."""

    def emit(self, record: logging.LogRecord) -> None:
        # Unlike a StreamHandler it raises: a closed pipe ends the command.
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def _nobody_reads_output() -> bool:
    """Whether it is the standard output that broke, and not a pipe to some other process."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # which reports errors and nothing else
    return bool(poll.poll(0))
