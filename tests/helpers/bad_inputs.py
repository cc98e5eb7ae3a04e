"""Commands with bad input: a case holds the command and the expected words, and `judge` runs the case.

A refused command ends with one line on standard error, `error: ...`, which contains the words of the case. A command
that recovers ends with status 0 and prints the words too. Every other end is a fault: a traceback, a hang, a silent
wrong or an unclear message. A silent wrong is status 0 instead of a refusal, a wrong result, or a bad file left under
a good name.
"""

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from tiny_runs import CONFIG, TRANSLATION_CONFIG

from moe_hf import cli
from moe_hf.checksums import CHECKSUM_FILE
from moe_hf.demo.text_corpus import write_demo_corpus

SECONDS = 60
FAULTS = ("traceback", "hang", "silent wrong", "unclear message")
RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "no"}


class Place:
    """An empty folder for one case, and methods that create what the case needs there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def lm(self, name: str = "lm", checksums: bool = False) -> Path:
        """Returns the output folder of a language model's run of four steps, with checkpoint-2 and checkpoint-4.

        Without `checksums` the checkpoints look like an earlier release's: damage shows only when a file is read.
        """
        return self._copy(_trained_lm(), name, checksums)

    def translator(self, name: str = "translator", checksums: bool = False) -> Path:
        """Returns the output folder of a translation model's run of four steps, en to de."""
        return self._copy(_trained_translator(), name, checksums)

    def lm_config(self, /, *, with_text: bool = False, **changes) -> Path:
        """Writes the YAML file of a language model's run into `folder/run`.

        The text that the file names exists only `with_text`: without it, a refusal shows that no data was read before.
        """
        text = _originals() / "lm_text"
        files = {
            part: [str(text / f"{part}.txt") if with_text else "/nowhere/text.txt"] for part in ("train", "valid")
        }
        values = {"train_files": files["train"], "validation_files": files["valid"]}
        return self._config(CONFIG, values | changes)

    def translation_config(self, /, *, with_text: bool = False, **changes) -> Path:
        """Writes the YAML file of a translation model's run; `with_text` as in `lm_config`."""
        text = _originals() / "pairs" if with_text else Path("/nowhere")
        values = {"train_source_files": [f"{text}/text.en"], "train_target_files": [f"{text}/text.de"]}
        return self._config(TRANSLATION_CONFIG, values | {"source_language": "en", "target_language": "de"} | changes)

    def _config(self, defaults: str, values: dict) -> Path:
        paths = {"cache_dir": str(_originals() / "cache"), "output_dir": str(self.folder / "run")}
        merged = yaml.safe_load(defaults) | paths | values
        return self.file("config.yaml", yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))

    def _copy(self, original: Path, name: str, checksums: bool) -> Path:
        copied = Path(shutil.copytree(original, self.folder / name))
        for file in [] if checksums else copied.glob(f"checkpoint-*/{CHECKSUM_FILE}"):
            file.unlink()
        return copied


@dataclass(frozen=True)
class Case:
    """One command with something wrong.

    Attributes:
        name: what is wrong with the input.
        command: prepares a `Place` for the command, and returns the arguments of `moe-hf`.
        says: words that the error must contain, or the warning of a command that recovers.
        ends: "refused" or "recovers".
        check: called afterwards with the place and the outcome, for both ends; returns what is wrong, or None.
        in_process: whether the command runs in this process, which is faster; a subprocess can be stopped in any hang.
        input: standard input of a subprocess.
    """

    name: str
    command: Callable[[Place], list]
    says: tuple[str, ...] | str = ()
    ends: str = "refused"
    check: Callable[[Place, "Outcome"], str | None] | None = None
    in_process: bool = True
    input: bytes | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `error` is the traceback of the exception that it raised, or None."""

    status: int | None
    out: str
    err: str
    error: str | None = None
    is_hang: bool = False


@dataclass(frozen=True)
class Verdict:
    """The judgement of a case; `fault` is one of FAULTS, or None."""

    fault: str | None
    why: str = ""


def judge(case: Case, folder: Path) -> Verdict:
    """Runs a case in an empty folder."""
    place = Place(folder)
    arguments = [str(argument) for argument in case.command(place)]
    outcome = _in_process(arguments) if case.in_process else _in_subprocess(arguments, case.input)
    told = f"{outcome.out[-2000:]}\n{outcome.err[-2000:]}"
    if outcome.is_hang:
        return Verdict("hang", f"after {SECONDS} s: {told}")
    if outcome.error or "Traceback (most recent call last)" in outcome.out + outcome.err:
        return Verdict("traceback", outcome.error or told)
    if (outcome.status == 0) != (case.ends == "recovers"):
        return Verdict(
            "silent wrong" if outcome.status == 0 else "unclear message", f"status {outcome.status}: {told}"
        )
    if case.check and (problem := case.check(place, outcome)):
        return Verdict("silent wrong", f"{problem}: {told}")
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if case.ends == "refused" and (len(errors) != 1 or outcome.err.splitlines()[-1] != errors[0]):
        return Verdict("unclear message", f"expected one line, and that the last: {told}")
    where = errors[0] if case.ends == "refused" else outcome.out + outcome.err
    missing = [word for word in ([case.says] if isinstance(case.says, str) else case.says) if word not in where]
    return Verdict("unclear message", f"without {missing}: {where}") if missing else Verdict(None)


class _Hang(BaseException):
    pass


def _in_process(arguments: list[str]) -> Outcome:
    def stop(*_):
        raise _Hang

    out, err = io.StringIO(), io.StringIO()
    before, disk = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_FSIZE)
    keyboard, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO())
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
        return Outcome(status, out.getvalue(), err.getvalue())
    except SystemExit as end:
        return Outcome(end.code, out.getvalue(), err.getvalue())
    except _Hang:
        return Outcome(None, out.getvalue(), err.getvalue(), is_hang=True)
    except BaseException:
        return Outcome(1, out.getvalue(), err.getvalue(), error=traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.stdin = keyboard
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk[1], disk[1]))  # a case may have lowered the limit


def _in_subprocess(arguments: list[str], stdin: bytes | None) -> Outcome:
    command = [sys.executable, "-m", "moe_hf", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, input=stdin or b"", capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired as error:
        texts = [(text or b"").decode(errors="replace") for text in (error.stdout, error.stderr)]
        return Outcome(None, *texts, is_hang=True)
    return Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


@functools.cache
def _originals() -> Path:
    """Returns the folder that all cases of a process share; it is written once, and no case changes it."""
    folder = tempfile.TemporaryDirectory(prefix="moe-hf-bad-inputs-")
    _kept.append(folder)
    path = Path(folder.name)
    (path / "lm_text").mkdir()
    write_demo_corpus(path / "lm_text", num_train_lines=40, num_valid_lines=8)
    (path / "pairs").mkdir()
    for language, lines in {
        "en": ["a dog", "the small cat", "no"],
        "de": ["ein Hund", "die kleine Katze", "nein"],
    }.items():
        (path / "pairs" / f"text.{language}").write_text("\n".join(lines * 8) + "\n", encoding="utf-8")
    return path


_kept: list[tempfile.TemporaryDirectory] = []


@functools.cache
def _trained_lm() -> Path:
    return _train("train-lm", Place(_originals() / "of_lm").lm_config(with_text=True, **RUN))


@functools.cache
def _trained_translator() -> Path:
    return _train("train-translation", Place(_originals() / "of_translator").translation_config(with_text=True, **RUN))


def _train(command: str, config: Path) -> Path:
    outcome = _in_process([command, str(config)])
    if outcome.status != 0:
        raise RuntimeError(f"{json.dumps(str(config))}: {outcome}")
    return config.parent / "run"
