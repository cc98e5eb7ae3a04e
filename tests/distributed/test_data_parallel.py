"""DDP and accelerate's FSDP2 train like one process with the global batch, and idle experts do not block training."""

import pytest
import torch
from parallel_runs import assert_same_training, train
from processes import on_processes

pytestmark = pytest.mark.distributed
TIED = {"tie_word_embeddings": True}
# name: (family, keyword arguments of `train`); DDP without find_unused_parameters, which is the default here
CASES = {
    "lm noisy": ("lm", {"gate": "noisy"}),
    "gnmt hierarchical": ("gnmt", {"gate": "hierarchical"}),
    "lm balanced": ("lm", {"gate": "balanced"}),
    "lm accumulated": ("lm", {"gate": "noisy", "gradient_accumulation_steps": 2}),
    "gnmt accumulated": ("gnmt", {"gate": "balanced", "gradient_accumulation_steps": 2}),
    "gnmt recomputed layers": ("gnmt", {"gate": "noisy", "activation_checkpointing": True}),
    "lm all tokens to two experts": ("lm", {"gate": "hierarchical", "crowd": True}),
    "lm processes without a token": ("lm", {"gate": "noisy", "empty_from": 4}),
    "lm tied": ("lm", {"changes": TIED}),
    "gnmt tied": ("gnmt", {"changes": TIED}),
    "gnmt tied, with a deep output": ("gnmt", {"changes": TIED | {"deep_output": True}}),
}
IN_BFLOAT16 = {
    "lm bfloat16": ("lm", {"gate": "softmax", "bf16": True, "activation_checkpointing": True}),
    "gnmt bfloat16": ("gnmt", {"gate": "softmax", "bf16": True, "gradient_accumulation_steps": 2}),
}
# The processes exchange rows of the experts, not gradients.
FACTORED = {
    "lm factored": ("lm", {"expert_gradients": "factored", "optim": "factored_adam"}),
    "gnmt factored accumulated": (
        "gnmt",
        {"expert_gradients": "factored", "optim": "factored_adam", "gradient_accumulation_steps": 2, "gate": "noisy"},
    ),
}
KINDS = {"ddp": None, "fsdp": "fsdp", "expert parallel": 2}


def train_all_cases(kind):
    cases = IN_BFLOAT16 if kind == "expert parallel" else CASES | IN_BFLOAT16
    if kind == "ddp":
        cases = cases | FACTORED
    return {name: train(family, layout=KINDS[kind], **case) for name, (family, case) in cases.items()}


@pytest.fixture(scope="module", params=KINDS)
def runs(request):
    """Returns the kind and {case: records of each process}; one start of the processes runs all cases."""
    results = on_processes(2, train_all_cases, request.param, timeout=300)
    return request.param, {name: [result[name] for result in results] for name in results[0]}


@pytest.fixture(scope="module")
def single():
    """Returns a function from a case to the records of a single process."""
    made = {}

    def run(name):
        if name not in made:
            family, arguments = (CASES | IN_BFLOAT16 | FACTORED)[name]
            made[name] = train(family, **arguments)
        return made[name]

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("runs", ["ddp", "fsdp"], indirect=True)
def test_training_equals_a_single_process(runs, single, case):
    kind, parts = runs[0], runs[1][case]
    assert all(part["sharded"] == (kind == "fsdp") for part in parts)
    assert (parts[0]["class"] == "DistributedDataParallel") == (kind == "ddp")
    assert_same_training(parts, single(case))


@pytest.mark.parametrize("case", FACTORED)
@pytest.mark.parametrize("runs", ["ddp"], indirect=True)
def test_factored_gradients_equal_a_single_process(runs, single, case):
    assert_same_training(runs[1][case], single(case))


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_bfloat16_differs_by_its_rounding_only(runs, single, case):
    parts, expected = runs[1][case], single(case)
    # bfloat16 keeps 8 bits, and autocast rounds sums over other groups of tokens.
    torch.testing.assert_close(parts[0]["loss"], expected["loss"], rtol=2**-7, atol=0)
    for part in parts:
        torch.testing.assert_close(part["grad_norm"], expected["grad_norm"], rtol=2**-5, atol=0)
