"""A strictly balanced gate over several processes chooses the same experts as one process with all tokens."""

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import on_processes

from moe_hf import StrictlyBalancedGate
from moe_hf.distributed.communication import row_bytes
from moe_hf.distributed.global_batch import balance_over_global_batch
from moe_hf.models.balanced_gating import batchwise_mask, tokens_for_each_expert

WORLD, NUM_EXPERTS, PER_TOKEN = 3, 4, 2
CASES = list(itertools.product((torch.float32, torch.float64), ("different", "equal", "padded", "unequal", "few")))


def batches(dtype, kind, num_tokens=12):
    """The gates (T, E) and the real tokens (T, 1) of each process."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rank in range(WORLD):
        number = {"unequal": [0, 3, 17][rank], "few": int(rank == 1)}.get(kind, num_tokens)
        gates = torch.rand(number, NUM_EXPERTS, generator=generator, dtype=dtype).softmax(-1)
        if kind == "equal":  # many ties within and across processes
            gates = (gates * 20).round() / 20
        is_token = torch.ones(number, 1, dtype=torch.bool)
        if kind == "padded":
            is_token = torch.rand(number, 1, generator=generator) > 0.5
        parts.append((gates, is_token))
    return parts


def choose_all():
    dist.init_process_group("gloo")
    gate = StrictlyBalancedGate(8, NUM_EXPERTS, PER_TOKEN).train()
    balance_over_global_batch(gate)
    chosen = []
    for case in CASES:
        gates, is_token = batches(*case)[dist.get_rank()]
        chosen.append(gate.choose_by_batch(gates, is_token, int(is_token.sum()))[0])
    return chosen, [count_bytes(gate, num_tokens) for num_tokens in (12, 120)]


def count_bytes(gate, num_tokens):
    """Bytes that a process gives to the collectives of a call."""
    gates, is_token = batches(torch.float32, "different", num_tokens)[dist.get_rank()]
    given, collectives = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(collective, *args, **kwargs):
        tensor = args[0] if isinstance(args[0], torch.Tensor) else args[1]
        given.append(len(tensor.view(-1)) * row_bytes(tensor.view(-1)))
        return collective(*args, **kwargs)

    for name, collective in collectives.items():
        setattr(dist, name, lambda *args, collective=collective, **kwargs: counted(collective, *args, **kwargs))
    try:
        gate.choose_by_batch(gates, is_token, num_tokens)
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)
    return sum(given)


@pytest.fixture(scope="module")
def chosen():
    return on_processes(WORLD, choose_all)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_are_those_of_one_process(chosen, case):
    gates, is_token = (torch.cat(parts) for parts in zip(*batches(*case)))
    m = tokens_for_each_expert(int(is_token.sum()), NUM_EXPERTS, PER_TOKEN)
    expected = batchwise_mask(gates, m, is_token)
    assert torch.equal(torch.cat([masks[CASES.index(case)] for masks, _ in chosen]), expected)


def test_what_is_exchanged_does_not_grow_with_the_tokens(chosen):
    for _, (few, many) in chosen:
        assert few == many > 0
