"""Two machines with two processes each, as two torchruns that meet at a rendezvous and share a folder."""

import socket
import sys

import pytest
from launching import finish, launch, losses, script
from tiny_runs import write_config

pytestmark = pytest.mark.distributed
NODES = 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", NODES, "--nproc_per_node", 2]
RENDEZVOUS = ["--rdzv_backend", "c10d"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_nodes(folder, output, *options):
    endpoint = ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", output]
    command = [*TORCHRUN, *RENDEZVOUS, *endpoint, *script(folder, output, 4, *options)]
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
    assert sum(output.count("eval_loss = ") for output in outputs) == 1  # only one process reports
    assert (folder / "hybrid" / "model.safetensors").is_file()
