"""Ctrl-C and a scheduler's SIGTERM end a command with one line, wherever it is."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise a `KeyboardInterrupt`, whose argument is the signal's number, for SIGINT and SIGTERM.

    A terminal sends Ctrl-C to the worker processes too, which were forked with these handlers. They leave the end to
    the command, which stops its workers, and so print nothing.

    Outside of the main thread, and for a signal that is ignored or handled already, nothing changes.
    """
    process, unraisable, received = os.getpid(), sys.unraisablehook, []

    def interrupt(number, frame):
        if os.getpid() == process:
            received.append(number)
            # The libraries' generators are closed in mid-work, and Python would print what they complain of.
            sys.unraisablehook = lambda _: None
            raise KeyboardInterrupt(number)
        if number == signal.SIGTERM:
            os._exit(128 + number)

    with ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", unraisable)
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == default:
                try:
                    stack.callback(signal.signal, number, signal.signal(number, interrupt))
                except ValueError:  # not the main thread
                    break
        try:
            yield
        except BaseException as error:
            if not received:
                raise
            # A library that waits for workers may have raised an error of its own.
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise KeyboardInterrupt(received[0]) from None
