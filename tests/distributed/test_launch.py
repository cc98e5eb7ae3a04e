"""The train scripts under torchrun and `accelerate launch`, as a user starts them."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, finish, launch, losses, script
from tiny_runs import write_config

from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm

pytestmark = pytest.mark.distributed
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    _, *arguments = map(str, script(folder, "single", 1))
    train_lm(*parse_arguments(arguments))
    return losses(folder, "single")


def test_torchrun(folder, single):
    options = ("--expert_parallel_size", -1, "--use_cpu", "false")  # which has no effect without a GPU
    output = finish(launch(*TORCHRUN, 2, *script(folder, "torchrun", 2, *options)))
    assert losses(folder, "torchrun") == pytest.approx(single, rel=1e-5), output
    assert output.count("model: ") == output.count("eval_loss = ") == 1  # one process reports


# (configuration, processes, options); on a CPU accelerate takes DDP for FSDP, so that only its options are tested here
LAUNCHES = [
    ("ddp", 2, []),
    ("fsdp2", 2, []),
    ("expert-parallel", 2, ["--expert_parallel_size", -1]),
    ("hybrid", 4, ["--expert_parallel_size", 2]),
]


@pytest.mark.parametrize(("name", "processes", "options"), LAUNCHES, ids=[name for name, *_ in LAUNCHES])
def test_accelerate_launch(folder, single, name, processes, options):
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    # Losses to 1e-5 need float32, which the files do not name.
    command = (*ACCELERATE, "--config_file", file, "--num_processes", processes, "--mixed_precision", "no")
    output = finish(launch(*command, *script(folder, name, processes, *options)))
    assert losses(folder, name) == pytest.approx(single, rel=1e-5), output


def test_torchrun_ends_within_seconds_when_a_process_is_killed(folder):
    options = ("--expert_parallel_size", -1, "--max_steps", 100000, "--logging_steps", 5)
    job = launch(*TORCHRUN, 2, *script(folder, "killed", 2, *options))
    seen = []
    for line in job.stdout:
        seen.append(line)
        if line.startswith("{'loss'"):
            break
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 2, "".join(seen)
    os.kill(int(children[1]), signal.SIGKILL)
    start = time.monotonic()
    output = finish(job, timeout=60)
    assert time.monotonic() - start < 30
    assert job.returncode != 0
    assert "ChildFailedError" in output and "Signal 9 (SIGKILL)" in output, output


def test_torchrun_restarts_a_run_from_its_last_checkpoint(folder, monkeypatch):
    # Otherwise torch 2.13 gives the second start the store of the first, with addresses of processes that are gone.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ("--max_steps", 40, "--save_strategy", "steps", "--save_steps", 5)
    _, *arguments = map(str, script(folder, "uninterrupted", 1, *options))
    train_lm(*parse_arguments(arguments))
    options = (*options, "--expert_parallel_size", -1, "--resume_from_checkpoint")
    job = launch(*TORCHRUN, 2, "--max_restarts", 1, *script(folder, "restarted", 2, *options))
    first = folder / "restarted" / "checkpoint-5" / "trainer_state.json"
    end = time.monotonic() + 60
    while not first.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output = finish(job)
    assert job.returncode == 0 and output.count("train: 40 lines") == 2, output  # started twice
    # The first epoch has 10 whole batches. Two processes divide the last batch of 7 rows differently from one process.
    restarted, uninterrupted = losses(folder, "restarted"), losses(folder, "uninterrupted")
    assert len(restarted) == 40 and restarted[:10] == pytest.approx(uninterrupted[:10], rel=1e-5), output
