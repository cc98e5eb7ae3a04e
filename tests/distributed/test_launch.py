"""The train scripts under torchrun and `accelerate launch`, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import write_config

from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
TIMEOUT = 180


def launch(*command):
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=TIMEOUT):
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def script(folder, output, world_size, *options):
    rows = str(8 // world_size)
    options = ("--gating", "softmax_top_k", "--dropout", 0, "--logging_steps", 1, "--learning_rate", 0.02, *options)
    arguments = ("--per_device_train_batch_size", rows, "--output_dir", f"{folder}/{output}", *options)
    return (ROOT / "scripts" / "train_lm.py", f"{folder}/config.yaml", *arguments)


def losses(folder, output):
    state = json.loads((folder / output / "trainer_state.json").read_text(encoding="utf-8"))
    return [log["loss"] for log in state["log_history"] if "loss" in log]


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
    output = finish(launch(*TORCHRUN, 2, *script(folder, "torchrun", 2, "--expert_parallel_size", -1)))
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
    command = (*ACCELERATE, "--config_file", file, "--num_processes", processes)
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
