"""What can be done from a command line: one module for each subcommand of `moe-hf`, and here what they share."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..errors import InputError
from .exit_status import exit_status_of


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a subcommand's arguments, which names itself `moe-hf NAME`."""
    return argparse.ArgumentParser(
        prog=f"moe-hf {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(command: Callable[[], dict | None]) -> int:
    """Call `command` and print the metrics that it returns, or its error as one line on standard error.

    Meanwhile the package's messages are printed too, see `printed_messages`.

    Returns:
        the exit status, see `exit_status_of`.
    """

    def run() -> int:
        with printed_messages():
            print_metrics(command() or {})
        return 0

    return exit_status_of(run)


def print_metrics(metrics: dict[str, float | str]) -> None:
    """Print a line for each."""
    for name, value in metrics.items():
        print(f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:.4f}")
    sys.stdout.flush()


@contextmanager
def printed_on_error(metrics: dict[str, float | str]) -> Iterator[None]:
    """Print the metrics, which took work, even if what follows ends in an error."""
    try:
        yield
    except InputError:
        print_metrics(metrics)
        raise


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
