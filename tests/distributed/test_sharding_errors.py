"""Models that cannot be sharded and unequal starts give a clear error on each process, without waiting."""

import os

import pytest
from parallel_runs import make_model
from processes import errors_of_processes
from tiny_runs import write_config
from transformers.distributed import DistributedConfig

from moe_hf import LstmMoeForCausalLM
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm

SECONDS = 60


def load(folder, config, config_of_the_last=None):
    """`from_pretrained` with one copy of each expert."""
    from torch import distributed

    distributed.init_process_group("gloo")
    if distributed.get_rank() == distributed.get_world_size() - 1:
        config = config | (config_of_the_last or {})
    path = f"{folder}/{distributed.get_rank()}"
    model = make_model("lm", **config)
    model.config.save_pretrained(path)
    from safetensors.torch import save_file

    save_file(model.state_dict(), f"{path}/model.safetensors", metadata={"format": "pt"})
    size = distributed.get_world_size()
    LstmMoeForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=size, ep_size=size))


CANNOT = {
    "experts": ({"num_experts": 5}, None, "ep_size=2 must divide num_experts=5"),
    "no experts": ({"layer_pattern": ["lstm"]}, None, "the model has no 'moe' layer"),
    "deep experts": ({"num_expert_layers": 2}, None, "ep_size=2 needs num_expert_layers=1, not 2"),
    "another config": ({}, {"num_experts": 6}, "num_experts=6 on process 1 differs from num_experts=8 on process 0"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_from_pretrained_refuses_on_every_process(tmp_path, case):
    *configs, message = CANNOT[case]
    for error in errors_of_processes(2, load, tmp_path, *configs, timeout=SECONDS):
        assert error.startswith(f"ValueError: {message}") or message in error.splitlines()[0], error


def train(folder, options, options_of_the_last=()):
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    train_lm(*parse_arguments([f"{folder}/config.yaml", *options, *(options_of_the_last if is_last else ())]))


SIZE = ["--expert_parallel_size", "2"]
REFUSED = {
    "size": (["--expert_parallel_size", "3"], [], "expert_parallel_size=3 must divide the number of processes, 2"),
    "experts": ([*SIZE, "--num_experts", "5"], [], "ep_size=2 must divide num_experts=5"),
    "no experts": ([*SIZE, "--layer_pattern", "lstm"], [], "the model has no 'moe' layer"),
    "another model": (SIZE, ["--num_experts", "6"], "num_experts=6 on process 1 differs from num_experts=4 on"),
    "another model, DDP": ([], ["--num_experts", "6"], "num_experts=6 on process 1 differs from num_experts=4 on"),
    "another seed": ([], ["--seed", "1"], "seed=1 on process 1 differs from seed=42 on process 0"),
    "cannot be built": ([*SIZE, "--num_experts_per_tok", "9"], [], "num_experts_per_tok=9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses_on_every_process(tmp_path, case):
    write_config(tmp_path)
    *options, message = REFUSED[case]
    for error in errors_of_processes(2, train, tmp_path, *options, timeout=SECONDS):
        assert error.startswith("InputError: ") and message in error.splitlines()[0], error
