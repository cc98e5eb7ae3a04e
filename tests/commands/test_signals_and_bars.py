"""A command's messages have separate lines beside progress bars, and a signal ends a command with one line."""

import io
import logging
import os
import signal
import sys
import warnings
from contextlib import redirect_stderr

import multiprocess
import pytest
from tqdm import tqdm

from moe_hf.commands import run_command
from moe_hf.errors import InputError


@pytest.fixture(autouse=True)
def default_handlers():
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def assert_on_a_clean_line(message: str, text: str):
    """Before it stands a line's end, or a bar that was wiped out."""
    before = text[: text.index(message)]
    assert before.endswith("\n") or before.rpartition("\r")[0].rpartition("\r")[2].isspace(), repr(text)
    assert before.endswith(("\n", "\r"))


@pytest.mark.parametrize(
    "say",
    [
        lambda: logging.getLogger("moe_hf.any").warning("a message"),
        lambda: logging.getLogger("transformers").warning("a message"),
        lambda: warnings.warn_explicit("a message", UserWarning, "file.py", 1, registry={}),
    ],
    ids=["ours", "library", "python"],
)
@pytest.mark.filterwarnings("default")
def test_messages_beside_a_bar(say, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(warnings, "showwarning", lambda message, *args: sys.stderr.write(f"{message}\n"))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(terminal)])

    def command():
        with tqdm(total=2, file=terminal, mininterval=0) as bar:
            bar.update()
            say()

    with redirect_stderr(terminal):
        assert run_command(command) == 0
    assert_on_a_clean_line("a message", terminal.getvalue())


@pytest.mark.parametrize("error", [InputError("a message"), KeyboardInterrupt()])
def test_the_end_beside_a_bar(error):
    terminal, bars = io.StringIO(), []

    def command():
        bars.append(tqdm(total=2, file=terminal, mininterval=0))
        bars[0].update()
        raise error

    with redirect_stderr(terminal):
        assert run_command(command) != 0
    assert_on_a_clean_line("error: a message" if str(error) else "interrupted", terminal.getvalue())
    assert terminal.getvalue().endswith("message\n" if str(error) else "interrupted\n")


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")])
def test_a_signal_ends_a_command(number, line, capsys):
    assert run_command(lambda: signal.raise_signal(number)) == 128 + number
    assert capsys.readouterr().err == line


def _send_to_all(connection):
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
    connection.send("still there")
    signal.pause()


def test_workers_say_nothing_and_hide_nothing(capfd):
    def command():
        ours, theirs = multiprocess.Pipe()
        with multiprocess.Pool(1) as pool:
            waiting = pool.apply_async(_send_to_all, [theirs])
            assert ours.recv() == "still there"
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                waiting.get(timeout=0.05)  # as `datasets` does: an error in place of the interruption

    assert run_command(command) == 130
    assert capfd.readouterr().err == "interrupted\n"
