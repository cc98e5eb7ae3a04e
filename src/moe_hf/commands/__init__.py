"""The subcommands of `moe-hf`, one module each, and the functions that they share."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError
from .exit_status import exit_status_of
from .parser import command_parser as command_parser

PACKAGE = Path(__file__).parents[1]


def run_command(command: Callable[[], dict | None]) -> int:
    """Call `command` and print the metrics that it returns, or its error as one line on standard error.

    The package's log messages are printed while `command` runs, see `printed_messages`.

    Returns:
        the exit status, see `exit_status_of`.
    """

    def run() -> int:
        with printed_messages():
            print_metrics(command() or {})
        return 0

    return exit_status_of(run)


def print_metrics(metrics: dict[str, float | int | str]) -> None:
    """Print one line for each metric; a count has no decimals."""
    for name, value in metrics.items():
        print(f"{name} = {value}" if isinstance(value, str | int) else f"{name} = {value:.4f}")
    sys.stdout.flush()


@contextmanager
def printed_on_error(metrics: dict[str, float | str]) -> Iterator[None]:
    """Print the metrics even if the block under `with` raises an error: the work for them is done."""
    try:
        yield
    except InputError:
        print_metrics(metrics)
        raise


@contextmanager
def printed_messages() -> Iterator[None]:
    """Print the package's log, one line a record: messages on standard output, warnings on standard error."""
    logger, handler = logging.getLogger("moe_hf"), _PrintHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with _others_clear_of_bars():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for bar in list(tqdm._instances):  # bars of interrupted work
            bar.close()


@contextmanager
def _others_clear_of_bars() -> Iterator[None]:
    """Keep the libraries' messages and Python's warnings off the lines of progress bars."""
    loggers = map(logging.getLogger, ("transformers", "datasets", "huggingface_hub"))
    handlers = [*chain.from_iterable(logger.handlers for logger in loggers), logging.lastResort]
    writers = [(handler, "emit") for handler in handlers] + [(warnings, "showwarning")]

    def clear_of_bars(write: Callable) -> Callable:
        def clear_and_write(*args, **kwargs) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                write(*args, **kwargs)

        return clear_and_write

    with ExitStack() as stack:
        stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        warnings.formatwarning = _short_if_ours(warnings.formatwarning)
        for owner, name in writers:
            before = getattr(owner, name)
            stack.callback(setattr, owner, name, before)
            setattr(owner, name, clear_of_bars(before))
        yield


def _short_if_ours(format_warning: Callable) -> Callable:
    """Return `format_warning`, except for this package's warnings: their message alone, without a line of code."""

    def short_or_whole(message, category, filename, lineno, line=None) -> str:
        if Path(filename).is_relative_to(PACKAGE):
            return f"warning: {message}\n"
        return format_warning(message, category, filename, lineno, line)

    return short_or_whole


class _PrintHandler(logging.Handler):
    """Prints each message on a separate line: clears progress bars before the message and redraws them after it."""

    def emit(self, record: logging.LogRecord) -> None:
        # Unlike StreamHandler, this handler lets errors through, so that a closed pipe ends the command.
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()
