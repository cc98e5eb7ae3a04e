"""Translation runs with one copy of each expert: the same losses, translations and model on 1, 2 and 4 processes."""

import os
import shutil

import pytest
import torch
from processes import on_processes
from safetensors.torch import load_file

from tests.training.test_translation import corpus, train

__all__ = ["corpus"]  # a fixture

pytestmark = pytest.mark.distributed
STEPS = 4  # batches of an optimizer step, over processes and accumulation
COURSE = "--dropout 0 --adam_epsilon 1e-3 --logging_steps 1 --max_steps 4 "
# Each process's batch is balanced on its own, and the number of batches at a time differs here.
COURSE += "--importance_loss_coef 0 --load_loss_coef 0 --gating softmax_top_k "
COURSE += "--save_strategy steps --save_steps 2 --expert_parallel_size -1"


def run(folder, output, *options):
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    argv = [*COURSE.split(), "--gradient_accumulation_steps", STEPS // world_size, "--output_dir", folder / output]
    trainer, metrics = train(folder, *argv, *options)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, metrics["eval_loss"], trainer.translations


def run_on(num_processes, *arguments):
    return run(*arguments) if num_processes == 1 else on_processes(num_processes, run, *arguments)[0]


@pytest.fixture(scope="module")
def whole(corpus):
    return run(corpus, "whole-1")


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_run_is_that_of_one_process(corpus, whole, num_processes):
    assert_same_run(run_on(num_processes, corpus, f"whole-{num_processes}"), whole)
    actual, expected = (load_file(corpus / f"whole-{n}" / "model.safetensors") for n in (num_processes, 1))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def half(corpus):
    """The folder of two steps on two processes."""
    run_on(2, corpus, "half", "--max_steps", 2)
    return corpus / "half"


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_run_goes_on_with_any_number_of_processes(corpus, whole, half, num_processes):
    output = shutil.copytree(half, corpus / f"resumed-{num_processes}")
    assert_same_run(run_on(num_processes, corpus, output.name, "--resume_from_checkpoint"), whole)


def assert_same_run(actual, expected):
    for part in range(2):
        assert actual[part] == pytest.approx(expected[part], rel=1e-5)
    assert actual[2] == expected[2]
