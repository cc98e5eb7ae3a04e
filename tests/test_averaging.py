"""`moe-hf average`: one model from the last checkpoints of a run."""

import shutil
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import write_config
from transformers import AutoTokenizer

from moe_hf.evaluation.language_model import evaluate_lm


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs of different width, `run` and `other`, which kept their last three checkpoints."""
    folder = tmp_path_factory.mktemp("averaging")
    write_config(folder)
    return folder


@pytest.fixture
def call(runs, call_command):
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3", "--learning_rate", "0.05"]
    for name, width in (("run", 8), ("other", 12)):
        if not (runs / name).exists():
            sizes = ["--output_dir", runs / name, "--hidden_size", width]
            assert call_command("train-lm", runs / "config.yaml", *saving, *sizes)[0] == 0
    return partial(call_command, "average")


def test_the_mean_of_every_weight(runs, call):
    status, output, _ = call(runs / "run", runs / "mean", "--last", "3")
    assert status == 0 and "averaged = checkpoint-2, checkpoint-3, checkpoint-4\n" in output
    parts = [load_file(runs / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    mean = load_file(runs / "mean" / "model.safetensors")
    assert mean.keys() == parts[0].keys()
    assert not np.array_equal(parts[0]["lm_head.weight"], parts[2]["lm_head.weight"])
    for name, found in mean.items():
        expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0).astype(np.float32)
        assert found.dtype == np.float32
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    two = runs / "two"
    assert call(runs / "run", two, "--last", "2")[0] == 0
    assert not np.array_equal(load_file(two / "model.safetensors")["lm_head.weight"], mean["lm_head.weight"])


def test_the_result_is_a_model_with_its_tokenizer(runs, call):
    assert call(runs / "run", runs / "whole", "--last", "2")[0] == 0
    assert AutoTokenizer.from_pretrained(runs / "whole").get_vocab()
    found = evaluate_lm(str(runs / "whole"), [str(runs / "valid.txt")])
    last = evaluate_lm(str(runs / "run"), [str(runs / "valid.txt")])
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=0.1) and found["eval_loss"] != last["eval_loss"]


def test_its_card_tells_training_and_averaging_but_not_the_runs_results(runs, call, call_command, tmp_path):
    assert call(runs / "run", runs / "of_card", "--last", "2")[0] == 0
    arguments = [runs / "of_card", "me/mean", "--dry-run", tmp_path / "card"]
    assert call_command("push", *arguments)[0] == 0
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "`moe-hf train-lm run.yaml` with this `run.yaml`" in card
    assert "the mean of the weights of 2 checkpoints (steps 3, 4)" in card
    assert "`moe-hf average runs/mean runs/mean-averaged --last 2`" in card
    assert "save_total_limit: 3\n" in card and "output_dir: runs/mean\n" in card
    assert "before step 4" in card and (tmp_path / "card" / "expert_history.png").is_file()
    assert "## Results" not in card  # the run's results belong to its last checkpoint


def test_a_card_of_one_checkpoint_tells_of_no_averaging(runs, call, call_command, tmp_path):
    assert call_command("push", runs / "run", "me/last", "--dry-run", tmp_path / "card")[0] == 0
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "## Results" in card and "average" not in card.partition("## Training")[2]


def test_checkpoints_without_the_states_of_a_training_are_averaged(runs, call, tmp_path):
    run = shutil.copytree(runs / "run", tmp_path / "run")
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "checksums*"):
        for file in run.glob(f"checkpoint-*/{pattern}"):
            file.unlink()
    assert call(run, tmp_path / "out", "--last", 2)[0] == 0
    assert call(runs / "run", tmp_path / "expected", "--last", 2)[0] == 0
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_what_cannot_be_averaged_is_named(runs, call, tmp_path):
    for last in (1, 4):
        status, _, error = call(runs / "run", tmp_path / "out", "--last", last)
        assert status == 1 and f"last={last} must be at least 2, and at most the 3 checkpoints that" in error
    status, _, error = call(runs / "nothing", tmp_path / "out")
    assert status == 1 and "nothing is not a folder" in error
    assert not (tmp_path / "out").exists()
    status, _, error = call(runs / "run", runs / "other", "--last", 2)
    assert status == 1 and "must be new or empty" in error
    mixed = shutil.copytree(runs / "run", tmp_path / "mixed")
    shutil.rmtree(mixed / "checkpoint-3")
    shutil.copytree(runs / "other" / "checkpoint-3", mixed / "checkpoint-3")
    status, _, error = call(mixed, tmp_path / "out", "--last", 2)
    assert status == 1 and "checkpoint-3 belongs to another model than" in error
    (mixed / "checkpoint-4" / "model.safetensors").unlink()
    status, _, error = call(mixed, tmp_path / "out", "--last", 2)
    assert status == 1 and "checkpoint-4 is incomplete" in error
