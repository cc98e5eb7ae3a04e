"""`moe-hf`: commands, help and exit codes."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from light_package import LIGHT_PACKAGE
from tiny_models import tiny_gnmt, tiny_lm
from tqdm import tqdm

from moe_hf import __version__, cli
from moe_hf.commands import (
    PACKAGE,
    evaluate_lm,
    evaluate_translation,
    print_metrics,
    printed_messages,
    run_command,
)

TEXT = ["--train_files", __file__, "--output_dir", "unused"]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Calls `moe-hf` with arguments, in a separate folder; returns exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_help_and_version(call):
    for arguments, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        found, output, _ = call(*arguments)
        assert found == status and all(f"  {name} " in output for name in cli.COMMANDS)
    assert call("--version") == (0, f"moe-hf {__version__}\n", "")


def test_an_unknown_command_is_named(call):
    status, _, error = call("trian-lm")
    assert status == 1 and "command='trian-lm' is not known, use one of train-lm," in error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_its_arguments_under_its_own_name(name, call):
    status, output, _ = call(name, "--help")
    assert status == 0 and f"moe-hf {name}" in " ".join(output.split())


def test_the_arguments_of_the_process_are_taken_and_left_as_they_are(monkeypatch, capsys):
    argv = ["/usr/bin/moe-hf", "plan", "--devices", "16"]
    monkeypatch.setattr("sys.argv", list(argv))
    assert cli.main() == 0 and "16 devices" in capsys.readouterr().out
    assert sys.argv == argv


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["train-lm", "--train_files", __file__, "--output_dir", "run", "--learning_rat", "1"],
            "'--learning_rat', did you mean '--learning_rate'",
        ),
        (["train-translation", "nothing.yaml"], "configuration file nothing.yaml does not exist"),
        (["translate", "nowhere", "-"], "nowhere"),
        (["evaluate", "nowhere", "file"], "model=nowhere: cannot be loaded"),
        (["push", "nowhere", "me/model"], "model=nowhere: cannot be loaded"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments, named, call):
    status, output, error = call(*arguments)
    assert (status, output) == (1, "") and named in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("metrics", [None, {"eval_loss": 1.0}])
def test_a_reader_that_has_read_enough_ends_a_command_quietly(metrics):
    printing = "print('first', flush=True); " if metrics is None else ""
    code = f"def command():\n    {printing}return {metrics}\n"
    code += f"{LIGHT_PACKAGE}from moe_hf.commands import run_command\n"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", code + "raise SystemExit(run_command(command))"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + 13, b"")


def test_another_broken_pipe_is_an_error():
    def command():
        raise BrokenPipeError("a worker")

    with pytest.raises(BrokenPipeError, match="a worker"):
        run_command(command)


def test_evaluate_takes_the_command_of_the_models_family(call, tmp_path, monkeypatch):
    for module in (evaluate_lm, evaluate_translation):
        monkeypatch.setattr(module, "main", lambda argv, name=module.__name__: print(name, *argv) or 0)
    tiny_lm().config.save_pretrained(tmp_path / "lm")
    tiny_gnmt().config.save_pretrained(tmp_path / "translator")
    assert call("evaluate", "lm", "file")[:2] == (0, "moe_hf.commands.evaluate_lm lm file\n")
    assert call("evaluate", "translator")[:2] == (0, "moe_hf.commands.evaluate_translation translator\n")


def test_messages_are_printed_warnings_as_errors_and_no_more_after_the_command(capsys):
    logger = logging.getLogger("moe_hf.training")

    def command():
        logger.info("a message")
        logger.warning("a warning")

    assert run_command(command) == 0
    logger.info("of a library")
    assert capsys.readouterr() == ("a message\n", "a warning\n")


def test_a_message_does_not_share_a_line_with_a_progress_bar(capsys):
    def command():
        with tqdm(total=2, file=sys.stderr) as bar:
            bar.update()
            logging.getLogger("moe_hf").warning("a warning")

    assert run_command(command) == 0
    before, after = capsys.readouterr().err.split("a warning\n")
    assert before.endswith("\r") and not before.split("\r")[-2].strip() and after.startswith("\r")


def test_a_warning_of_this_package_is_one_line_and_another_keeps_its_place():
    with printed_messages():
        ours = warnings.formatwarning("a warning", UserWarning, f"{PACKAGE}/models/moe.py", 7)
        others = warnings.formatwarning("a warning", UserWarning, "/elsewhere/library.py", 7)
    assert ours == "warning: a warning\n" and others == "/elsewhere/library.py:7: UserWarning: a warning\n"
    assert warnings.formatwarning("a", UserWarning, f"{PACKAGE}/a.py", 7).startswith(f"{PACKAGE}/a.py:7: ")


def test_a_count_is_printed_without_decimals(capsys):
    print_metrics({"dead_experts": 3, "eval_loss": 1.5, "note": "text"})
    assert capsys.readouterr().out == "dead_experts = 3\neval_loss = 1.5000\nnote = text\n"
