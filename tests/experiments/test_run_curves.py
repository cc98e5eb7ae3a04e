"""Training curves, read from logs and kept as CSV."""

import json

import pytest

from moe_hf.experiments.run_curves import read_curves, write_curves

MEASURES = {"loss": "loss", "bleu": "eval_bleu"}


@pytest.fixture
def folder(tmp_path):
    def write(logs: list[dict], end: dict):
        state = {"global_step": 20, "log_history": logs}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        (tmp_path / "eval_results.json").write_text(json.dumps(end))
        return tmp_path

    return write


def test_curves_are_what_was_logged(folder):
    logs = [{"step": 10, "loss": 3.0}, {"step": 10, "eval_bleu": 7.0}, {"step": 5, "loss": 4.0}, {"step": 20}]
    assert read_curves(folder(logs, {"eval_bleu": 9.0}), MEASURES) == {
        "loss": [(5, 4.0), (10, 3.0)],
        "bleu": [(10, 7.0)],
    }


def test_the_evaluation_at_the_end_stands_for_those_that_were_not_made(folder):
    assert read_curves(folder([], {"eval_bleu": 9.0}), MEASURES) == {"loss": [], "bleu": [(20, 9.0)]}


def test_a_line_for_every_step_of_every_run(tmp_path):
    runs = {
        ("a", 1): {"loss": [(5, 4.0), (10, 3.0)], "bleu": [(10, 7.0), (12, 8.25)]},
        ("a", 2): {"loss": [], "bleu": []},
    }
    write_curves(tmp_path / "curves.csv", runs)
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        *("model,seed,step,loss,bleu", "a,1,5,4.000,", "a,1,10,3.000,7.000", "a,1,12,,8.250"),
    ]
    write_curves(tmp_path / "curves.csv", {})
    assert (tmp_path / "curves.csv").read_text() == "model,seed,step\n"
