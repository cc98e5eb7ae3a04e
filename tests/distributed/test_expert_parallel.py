"""One copy of each expert over several processes trains like one process with the global batch."""

import pytest
import torch.distributed as dist
from parallel_runs import GATES, assert_same_training, train
from processes import on_processes

pytestmark = pytest.mark.distributed
FAMILIES = ("lm", "gnmt")
FACTORED = {"optim": "factored_adam", "expert_gradients": "factored", "weight_decay": 0.1}
# name: (family, keyword arguments of `train`)
CASES = {f"{family} {gate}": (family, {"gate": gate}) for family in FAMILIES for gate in GATES}
CASES |= {f"{family} tied": (family, {"changes": {"tie_word_embeddings": True}}) for family in FAMILIES}
CASES |= {
    "lm accumulated": ("lm", {"gate": "noisy", "gradient_accumulation_steps": 2}),
    "lm recomputed layers": ("lm", {"gate": "noisy", "activation_checkpointing": True}),
    "lm factored optimizer": ("lm", {"optim": "factored_adam"}),
    "lm factored gradients": ("lm", FACTORED),
    "lm factored gradients, processes without a token": ("lm", {"gate": "noisy", "empty_from": 2} | FACTORED),
    "gnmt hierarchical, factored gradients, accumulated": (
        "gnmt",
        {"gate": "hierarchical", "gradient_accumulation_steps": 2} | FACTORED,
    ),
    "lm factored gradients, recomputed layers": ("lm", {"gate": "noisy", "activation_checkpointing": True} | FACTORED),
    "lm all tokens to two experts": ("lm", {"crowd": True}),
    "gnmt all tokens to two experts": ("gnmt", {"crowd": True}),
    "lm processes without a token": ("lm", {"gate": "noisy", "empty_from": 2}),
    "lm strictly balanced, processes without a token": ("lm", {"gate": "balanced", "empty_from": 2}),
}
LAYOUTS = {"two": (2, 2), "four": (4, 4), "four, two copies of each expert": (4, 2)}


def train_all_cases(size):
    return {name: train(family, layout=size, **case) for name, (family, case) in CASES.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request):
    """Returns {case: records of each process} for one layout; one start of the processes runs all cases."""
    num_processes, size = LAYOUTS[request.param]
    results = on_processes(num_processes, train_all_cases, size, timeout=300)
    return {name: [result[name] for result in results] for name in CASES}


@pytest.fixture(scope="module")
def single():
    return {}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_a_single_process(runs, single, case):
    family, arguments = CASES[case]
    if case not in single:
        single[case] = train(family, **arguments)
    assert all(part["sharded"] for part in runs[case]) and not single[case]["sharded"]
    if GATES[arguments.get("gate", "softmax")] != GATES["balanced"]:
        assert min(single[case]["grad_norm"]) > 0.2  # clipping matters
    assert_same_training(runs[case], single[case])
    assert not dist.is_initialized()
