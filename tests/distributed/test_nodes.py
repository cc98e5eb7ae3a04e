"""Two machines of two processes each, as two torchruns that meet at a rendezvous and share a folder."""

import socket
import sys

import pytest
from launching import finish, launch, losses, script
from tiny_runs import write_config

pytestmark = pytest.mark.distributed
NODES = 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", NODES, "--nproc_per_node", 2]
# A machine that has already met the others asks for them again after a failure.
RENDEZVOUS = ["--rdzv_backend", "c10d", "--rdzv_conf", "join_timeout=120,last_call_timeout=3"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The last process dies in its third step, when it runs for the first time.
DIES_ONCE = """
import os, signal, sys
from moe_hf.commands.train_lm import main
from moe_hf.training.moe_trainer import SeedPerRankCallback

def die(self, args, state, control, **kwargs):
    if (state.global_step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "3", "0"):
        os.kill(os.getpid(), signal.SIGKILL)

SeedPerRankCallback.on_step_end = die
sys.exit(main(sys.argv[1:]))
"""


def start_nodes(folder, output, *options, program=None, restarts=0):
    endpoint = ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", output, "--max_restarts", restarts]
    train, *arguments = script(folder, output, 4, *options)
    command = [*TORCHRUN, *RENDEZVOUS, *endpoint, program or train, *arguments]
    return [launch(*command) for _ in range(NODES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    finish(launch(sys.executable, *script(folder, "single", 1)))
    return losses(folder, "single")


def test_one_copy_of_each_expert_on_every_machine(folder, single):
    outputs = [finish(node) for node in start_nodes(folder, "hybrid", "--expert_parallel_size", 2)]
    assert losses(folder, "hybrid") == pytest.approx(single, rel=1e-5), "\n".join(outputs)
    assert sum(output.count("eval_loss = ") for output in outputs) == 1  # one process of all reports
    assert (folder / "hybrid" / "model.safetensors").is_file()


def test_after_a_process_died_both_machines_start_again_from_the_checkpoint(folder, single):
    (folder / "dies_once.py").write_text(DIES_ONCE, encoding="utf-8")
    saving = ("--save_strategy", "steps", "--save_steps", 2, "--resume_from_checkpoint")
    nodes = start_nodes(folder, "again", *saving, program=folder / "dies_once.py", restarts=1)
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert any("SIGKILL" in output or "exitcode: -9" in output for output in outputs), "\n".join(outputs)
    assert losses(folder, "again") == pytest.approx(single, rel=1e-5), "\n".join(outputs)
