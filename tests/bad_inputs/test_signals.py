"""Real processes with Ctrl-C, SIGTERM, pipes without a reader, and standard streams that are closed or full."""

import io
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_inputs import Place
from light_package import LIGHT_PACKAGE

from moe_hf.commands.exit_status import exit_status_of
from moe_hf.writing import new_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMAND = f"{sys.executable} -m moe_hf"
# Buffered output, as in a shell.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
TOO_LONG = 120
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("signals")).translator()


def shell(line):
    return subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=TOO_LONG)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A command line of `moe-hf` without torch."""
    file = tmp_path_factory.mktemp("light") / "light.py"
    file.write_text(f"{LIGHT_PACKAGE}from moe_hf.cli import main\nsys.exit(main())\n")
    return f"{sys.executable} {file}"


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("{} --help | true; exit ${{PIPESTATUS[0]}}", 141, ""),
        ("{} --help >/dev/full", 1, "error: standard output: No space left on device\n"),
        ("{} --help >&-", 1, "error: standard output is closed: redirect it to a file, or to /dev/null\n"),
        ("{} --help 2>&- >/dev/null", 0, ""),
        ("{} --help >&- 2>&-", 1, ""),
        ("{} nothing 2>/dev/full", 1, ""),
        ("{} nothing 2>&- | cat; exit ${{PIPESTATUS[0]}}", 1, ""),
    ],
)
def test_a_stream_that_cannot_be_written(line, status, error, light):
    ended = shell(line.format(light))
    assert (ended.returncode, ended.stderr) == (status, error)
    assert "error" not in ended.stdout


def test_a_reader_of_translations_that_has_read_enough(translator):
    line = f"yes 'a dog' | head -n 300 | {COMMAND} translate {translator} --num_beams 1 --buffer_lines 1 2>/dev/null"
    ended = shell(f"{line} | head -n 1; exit ${{PIPESTATUS[2]}}")
    assert ended.returncode == 141 and ended.stdout.count("\n") == 1


def test_a_closed_standard_input(translator, call_command, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    status, out, error = call_command("translate", translator)
    assert (status, out) == (1, "") and error.splitlines()[-1].startswith("error: standard input is closed")


@pytest.mark.parametrize("buffer_lines", [1, 2, 2000])
def test_what_was_read_before_a_bad_line_is_translated(buffer_lines, translator, call_command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a dog\nno\na\n\xff\xfe\nno\n")))
    status, out, error = call_command("translate", translator, "--num_beams", 1, "--buffer_lines", buffer_lines)
    assert status == 1 and out.count("\n") == 3
    assert error.splitlines()[-1].startswith("error: ") and "line 4 is not UTF-8" in error.splitlines()[-1]


@pytest.mark.parametrize("seconds", [0.3, 1.5])
@pytest.mark.parametrize(
    "command",
    [["-m", "moe_hf", "evaluate-lm", "nowhere", "nothing"], [str(SCRIPTS / "demo.py"), "/dev/null/demo"]],
    ids=["moe-hf", "demo.py"],
)
def test_ctrl_c_while_libraries_are_imported(command, seconds):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command], env=ENVIRONMENT, stdin=subprocess.DEVNULL, **PIPES
    )
    lines = []
    for line in process.stderr:  # the import of the package has begun
        lines.append(line)
        if b"moe_hf.version" in line:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=TOO_LONG)
    said = [line for line in rest.splitlines() if not line.startswith(b"import time:")]
    # Without an interruption the command ends, because its input is bad.
    assert (process.returncode, said) == (130, [b"interrupted"])


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "terminated")])
def test_a_signal_while_a_command_works(number, said, translator):
    command = [*COMMAND.split(), "translate", str(translator), "--num_beams", "1", "--buffer_lines", "1"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, **PIPES)
    process.stdin.write(b"a dog\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], TOO_LONG)[0]  # a translation arrived: the command works
    process.send_signal(number)
    _, error = process.communicate(timeout=TOO_LONG)
    assert process.returncode == 128 + number
    assert error.decode().splitlines()[-1] == said and "Traceback" not in error.decode()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")])
def test_nothing_half_written_is_left_after_a_signal(number, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]

    def write() -> int:
        with new_folder(tmp_path / "parent" / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half of")
            signal.raise_signal(number)
        return 0

    assert exit_status_of(write) == 128 + number
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert exit_status_of(lambda: signal.raise_signal(signal.SIGTERM) or 7) == 7
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_leave_signals_to_the_command():
    def fork() -> int:
        if not (child := os.fork()):
            signal.raise_signal(signal.SIGINT)
            os._exit(7 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert exit_status_of(fork) == 7


def test_another_error_on_the_way_out_does_not_hide_the_signal(capsys):
    def command() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise TimeoutError("a pool of workers that has not done its work")

    assert exit_status_of(command) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_cannot_end_is_ended(tmp_path):
    code = "import signal, threading; from moe_hf.commands import exit_status; exit_status.GRACE = 0.1\n"
    code += "def command():\n    try: signal.raise_signal(signal.SIGTERM)\n    finally: threading.Event().wait(100)\n"
    file = tmp_path / "stuck.py"
    file.write_text(f"{LIGHT_PACKAGE}{code}exit_status.exit_status_of(command)")
    assert shell(f"{sys.executable} {file}").returncode == 143
