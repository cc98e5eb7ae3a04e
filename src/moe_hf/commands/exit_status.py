"""How a command ends: one line and an exit status for errors, signals and pipes that nobody reads."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import InputError, InterruptedRun, NonFiniteLossError, first_line
from ..models.finite import NonFiniteWeightsError

# Seconds after a signal in which a command removes unfinished files, and its workers end.
GRACE = 10
SAID = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}


class _Stopped(KeyboardInterrupt):
    """A signal arrived: unfinished files are removed while this exception propagates."""

    def __init__(self, number: int):
        super().__init__()
        self.status = 128 + number


def exit_status_of(main: Callable[[], int]) -> int:
    """Call `main`, and print its error as one line on standard error.

    Calls may be nested.

    Returns:
        the exit status: the one that `main` returns, or 1 after an error. After a signal it is 128 plus the signal's
        number, as in a shell: 130 for Ctrl-C, 143 for SIGTERM, and 141 when a reader such as `head` closed the pipe.
    """
    try:
        with _signals_as_exceptions(), _not_hidden():
            _open_standard_streams()
            try:
                status = main()
            except SystemExit:  # argparse has printed its help, or an error
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return status
    except (InputError, NonFiniteLossError, NonFiniteWeightsError) as error:
        return _ended(f"error: {error}", 1)
    except InterruptedRun as interruption:
        return _ended(str(interruption), 128 + interruption.signal_number)
    except KeyboardInterrupt as interruption:
        status = getattr(interruption, "status", 128 + signal.SIGINT)
        return _ended(SAID[status], status)
    except BrokenPipeError:
        if not _silence(_broken_streams()):
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:  # the argument that named the file is not known here
        _silence(_unwritable_streams())
        where = error.filename or ("standard output" if error.errno else "a file")
        return _ended(f"error: {where}: {error.strerror or first_line(error)}", 1)


def _ended(message: str, status: int) -> int:
    with suppress(OSError):  # nobody reads it
        print(message, file=sys.stderr, flush=True)
    _silence(_unwritable_streams())
    return status


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise exceptions in this process only; its workers ignore these signals.

    In a training with several processes, the launcher ends them with SIGTERM, which must not wait for Python.
    """
    handlers = {signal.SIGINT: _stop, signal.SIGTERM: _stop}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        del handlers[signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    # A signal that is ignored stays ignored, as in a background job of a shell or under nohup.
    handlers = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        while _timers:
            _timers.pop().cancel()


def _stop(number, frame):
    timer = threading.Timer(GRACE, os._exit, [128 + number])  # a pool may wait forever for a killed worker
    timer.daemon = True
    timer.start()
    _timers.append(timer)
    sys.unraisablehook = lambda unraisable: None  # from the libraries' unfinished generators
    raise _Stopped(number)


_timers: list[threading.Timer] = []


@contextmanager
def _not_hidden() -> Iterator[None]:
    """Raise the interruption even if it caused another error on the way out, such as a pool's unfinished work."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        raise (error if cause is None else cause)


def _say_no_more(number, frame):
    sys.unraisablehook = lambda unraisable: None  # from generators that the parent dropped


def _leave_signals_to_parent() -> None:
    """Keep a worker process from printing a traceback: the command itself ends the worker."""
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, _say_no_more)


os.register_at_fork(after_in_child=_leave_signals_to_parent)


def _open_standard_streams() -> None:
    """Refuse a closed standard output, which would lose results. A closed standard error only drops messages."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null")


def _streams() -> list:
    return [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "buffer")]


def _broken_streams() -> list:
    """Return the broken ones among standard output and error; empty if another pipe broke."""
    broken = []
    for stream in _streams():
        poll = select.poll()
        with suppress(OSError, ValueError):
            poll.register(stream, 0)  # 0: report errors only
            if poll.poll(0):
                broken.append(stream)
    return broken


def _unwritable_streams() -> list:
    unwritable = []
    for stream in _streams():
        try:
            stream.flush()
        except (OSError, ValueError):
            unwritable.append(stream)
    return unwritable


def _silence(streams: list) -> bool:
    """Drop the buffers of the streams, which Python would fail to flush at exit; return whether there are streams."""
    for stream in streams:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(streams)
