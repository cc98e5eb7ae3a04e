"""Runs of several processes save a whole model, resume with more or fewer processes, and stop when a process dies."""

import os
import shutil
import time

import pytest
import torch
from processes import TIMEOUT, Run, errors_of_processes, on_processes
from safetensors.torch import load_file
from tiny_runs import write_config
from transformers import AutoModelForCausalLM, TrainerCallback

from moe_hf.checksums import CHECKSUM_FILE
from moe_hf.errors import InputError
from moe_hf.hub import export
from moe_hf.run_folder import check_checkpoint
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.callbacks import AuxLossCallback
from moe_hf.training.lm import train_lm

pytestmark = pytest.mark.distributed
ROWS = 8  # of a step on all processes
COURSE = "--gating softmax_top_k --dropout 0 --carry_state true --tie_word_embeddings true --optim factored_adam "
COURSE += "--learning_rate 0.02 --adam_epsilon 1e-3 --max_grad_norm 0.5 --logging_steps 1 --max_steps 6 "
COURSE += "--save_strategy steps --save_steps 2"


def run(folder, output, *options):
    """The losses by step of a run as scripts/train_lm.py makes it."""
    rows = ROWS // int(os.environ.get("WORLD_SIZE", 1))
    argv = [f"{folder}/config.yaml", *COURSE.split(), "--output_dir", f"{folder}/{output}", *options]
    trainer, _ = train_lm(*parse_arguments([*argv, "--per_device_train_batch_size", str(rows)]))
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


class SlowDown(TrainerCallback):
    """Gives the test the time to kill a process."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(2 if state.global_step >= 3 else 0)


def run_slowly(*arguments):
    attach = AuxLossCallback.attach_to
    AuxLossCallback.attach_to = lambda callback, trainer: (trainer.add_callback(SlowDown()), attach(callback, trainer))
    return run(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """The losses of a run on one process, which also saves in shards."""
    return run(folder, "single", "--expert_parallel_size", "-1")


@pytest.fixture(scope="module")
def killed(folder):
    """Kills one process in a run's fifth step; returns all processes' results and the seconds until their end."""
    processes = Run(2, run_slowly, folder, "killed", "--expert_parallel_size", "-1")
    last = folder / "killed" / "checkpoint-4" / "trainer_state.json"
    while not last.exists() and time.monotonic() < processes.started + TIMEOUT:
        time.sleep(0.1)
    processes.kill(1)
    start = time.monotonic()
    return processes.join(), time.monotonic() - start


def test_a_killed_process_ends_the_others_with_an_error(killed):
    (survivor, victim), seconds = killed
    assert victim == "killed"
    assert survivor.startswith("RuntimeError: ") and "remote worker" in survivor
    assert seconds < 30


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_killed_run_goes_on_with_any_number_of_processes(folder, single, killed, num_processes):
    output = f"resumed-{num_processes}"
    shutil.copytree(folder / "killed", folder / output)
    options = (folder, output, "--expert_parallel_size", "-1", "--resume_from_checkpoint")
    losses = run(*options) if num_processes == 1 else on_processes(num_processes, run, *options)[0]
    assert losses == pytest.approx(single, rel=1e-5)
    assert_same_weights(folder / output, folder / "single")


def assert_same_weights(actual, expected):
    actual, expected = (load_file(path / "model.safetensors") for path in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_a_sharded_checkpoint_loads_and_resumes_without_sharding(folder, single, killed):
    shutil.copytree(folder / "killed", folder / "plain")
    weights = AutoModelForCausalLM.from_pretrained(folder / "plain" / "checkpoint-4").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(folder / "single" / "checkpoint-4").state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)
    assert run(folder, "plain", "--resume_from_checkpoint") == pytest.approx(single, rel=1e-5)
    assert not list((folder / "plain" / "checkpoint-6").glob("shard-*"))


def test_a_sharded_checkpoint_is_exported_whole(folder, killed, tmp_path, classes_as_before):
    checkpoint = folder / "killed" / "checkpoint-4"
    export(str(checkpoint), tmp_path / "repository")
    weights = load_file(tmp_path / "repository" / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert weights.keys() == expected.keys() - {"lm_head.weight"}  # tied
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert (tmp_path / "repository" / "modeling_lstm_moe.py").is_file()


def test_an_unsharded_checkpoint_is_no_sharded_one(folder):
    run(folder, "unsharded", "--max_steps", "2")
    options = (folder, "unsharded", "--expert_parallel_size", "2", "--resume_from_checkpoint")
    for error in errors_of_processes(2, run, *options):
        assert "InputError: resume_from_checkpoint=" in error


@pytest.mark.parametrize("part", ["optimizer/__1_0.distcp", "optimizer/.metadata", "shard-00002-*", "scheduler.pt"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_not_whole(killed, folder, tmp_path, part, damage):
    checkpoint = shutil.copytree(folder / "killed" / "checkpoint-2", tmp_path / "checkpoint-2")
    check_checkpoint(checkpoint)
    (checkpoint / CHECKSUM_FILE).unlink()  # as an earlier release left it
    check_checkpoint(checkpoint)
    [file] = checkpoint.glob(part)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match="incomplete|broken"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("part", ["optimizer/__1_0.distcp", "shard-00002-*", "rng_state_1.pth", "carried_state_1.pt"])
def test_a_flipped_bit_in_the_part_of_any_process_is_found(killed, folder, tmp_path, part):
    checkpoint = shutil.copytree(folder / "killed" / "checkpoint-2", tmp_path / "checkpoint-2")
    [file] = checkpoint.glob(part)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"{file.name} is not as it was saved"):
        check_checkpoint(checkpoint)


def test_several_processes_take_the_checkpoint_before_a_broken_one(folder, single, killed):
    shutil.copytree(folder / "killed", folder / "broken")
    (folder / "broken" / "checkpoint-4" / "carried_state_1.pt").unlink()
    options = (folder, "broken", "--expert_parallel_size", "-1", "--resume_from_checkpoint")
    losses = on_processes(2, run, *options)[0]
    assert losses == pytest.approx(single, rel=1e-5)
    check_checkpoint(folder / "broken" / "checkpoint-4")


def test_shards_of_a_deeper_model_are_refused(folder, killed):
    shutil.copytree(folder / "killed", folder / "deeper")
    (folder / "deeper" / "run_arguments.json").unlink()
    options = ("--layer_pattern", "lstm", "moe", "--resume_from_checkpoint")
    with pytest.raises(InputError, match=r"checkpoint-4 has weights that this run's model lacks: model\.layers\.2"):
        run(folder, "deeper", *options)
