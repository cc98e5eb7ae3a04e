"""Bytes that collectives move: the count is right, and sharded training moves the bytes of the cost model."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch.distributed import _functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_hf.distributed.communication import CollectiveCounter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = dict(hidden_size=16, moe_intermediate_size=24, num_experts=8, vocab_size=96, tokens=128)


def count_collectives() -> list:
    """Returns the counter's result for each collective of a group of four; only one process of the group exists."""
    # Nothing is sent: this process is the second of four, and the others do not exist.
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    world, results = dist.group.WORLD, []
    part, whole = torch.ones(6, 5), torch.ones(24, 5)
    for call in (
        lambda: dist.all_gather_into_tensor(whole, part),
        lambda: functional.all_gather_tensor(part, 0, world).wait(),
        lambda: dist.reduce_scatter_tensor(part, whole),
        lambda: functional.reduce_scatter_tensor(whole, "sum", 0, world).wait(),
        lambda: dist.all_reduce(whole),
        lambda: functional.all_reduce(whole, "sum", world).wait(),
        lambda: dist.all_to_all_single(whole, whole.clone()),
        lambda: dist.all_to_all_single(whole, whole.clone(), [6] * 4, [2, 1, 7, 14]),
        lambda: functional.all_to_all_single(whole, [6] * 4, [2, 1, 7, 14], world).wait(),
        lambda: dist.all_to_all_single(torch.ones(8, dtype=torch.long), torch.ones(8, dtype=torch.long)),
        lambda: dist.barrier(),
    ):
        with CollectiveCounter() as counter:
            call()
        results.append(dict(counter.sent))
    try:
        with CollectiveCounter():
            dist.broadcast(whole, 0)
    except NotImplementedError as error:
        results.append(str(error))
    return results


def test_each_collective_counts_what_leaves_the_rank():
    # Runs in a separate process, because the group would remain.
    [counted] = on_processes(1, count_collectives)
    part = 6 * 5 * 4
    assert counted == [
        {"all_gather": 3 * part},
        {"all_gather": 3 * part},
        {"reduce_scatter": 3 * part},
        {"reduce_scatter": 3 * part},
        {"all_reduce": 2 * 3 * part},
        {"all_reduce": 2 * 3 * part},
        {"all_to_all": 3 * part},
        {"all_to_all": 23 * 5 * 4},  # all rows except this process's
        {"all_to_all": 23 * 5 * 4},
        {"all_to_all of counts": 6 * 8},
        {},
        "the bytes of broadcast_ are not counted yet",
    ]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))  # for its `report`
    spec = importlib.util.spec_from_file_location("sharding_benchmark", BENCHMARKS / "sharding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "models"), [(2, None), (4, ["LM", "LM, experts recomputed", "translation"])])
def test_sharded_steps_move_the_bytes_of_the_cost_model(benchmark, processes, models, tmp_path):
    models = models or list(benchmark.MODELS)
    arguments = argparse.Namespace(**SIZES, models=models, steps=1)
    for name in models:
        benchmark.build(name, arguments).save_pretrained(tmp_path / name)
    results = benchmark.launch(processes, str(tmp_path), arguments)
    remote = (processes - 1) / processes
    assert results.pop("generation") == {"all_reduce": 2 * remote * SIZES["hidden_size"] * 4}
    assert list(results) == models
    for name, numbers in results.items():
        # The model assumes (P - 1) / P of the (token, expert) pairs elsewhere; the gate decides the real share.
        elsewhere = numbers["elsewhere"] / remote
        assert 0.8 < elsewhere < 1.2
        assert numbers["all_to_all"] == pytest.approx(numbers["planned all_to_all"] * elsewhere, rel=1e-9), name
        dense = numbers["all_gather"] + numbers["reduce_scatter"]
        assert dense == pytest.approx(numbers["planned dense"], rel=1e-9), name
        exchanges = 2 if name in ("translation", "LM, experts recomputed") else 1
        counts = exchanges * SIZES["num_experts"] * 8 * remote / SIZES["tokens"]
        assert numbers["all_to_all of counts"] == pytest.approx(counts, rel=1e-9), name
