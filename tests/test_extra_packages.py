"""Without a package of the extra `eval`, every command reports this on one line before it reads a model or data."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from moe_hf.commands import evaluate_lm, evaluate_translation, prune, translate
from moe_hf.commands import push as push_to_hub
from moe_hf.commands import report as routing_report

SCRIPTS = Path(__file__).parents[1] / "scripts"
COMMANDS = {
    "evaluate-lm": (evaluate_lm, "evaluate", ["nowhere", "text.txt"]),
    "evaluate-translation": (evaluate_translation, "sacrebleu", ["nowhere", "a.txt", "b.txt"]),
    "prune": (prune, "evaluate", ["nowhere", "text.txt", "{out}", "--keep", "2"]),
    "report": (routing_report, "matplotlib", ["nowhere", "text.txt"]),
    "translate": (translate, "matplotlib", ["nowhere", "text.txt", "--attention_plot", "plot.png"]),
    "push": (push_to_hub, "matplotlib", ["{run}", "me/model", "--dry-run", "{out}"]),
}


def assert_named(error: str, package: str) -> None:
    assert re.match(rf"error: the package '{package}' is missing, .*pip install '\.\[eval\]'.*\n\Z", error), error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_the_first_thing_that_is_said(command, tmp_path, monkeypatch, capsys):
    module, package, arguments = COMMANDS[command]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "expert_history.csv").touch()  # of which the card has a plot
    places = {"out": tmp_path / "out", "run": tmp_path / "run"}
    monkeypatch.setitem(sys.modules, package, None)
    assert module.main([text.format(**places) for text in arguments]) == 1
    assert_named(capsys.readouterr().err, package)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["table6", "capacity", "compare_translation"])
def test_an_experiment_says_so_before_it_trains(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("sys.argv", [f"{script}.py", "nowhere.yaml"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert_named(capsys.readouterr().err, "matplotlib")
