"""One copy of each expert over several processes: training is that of one process with the global batch."""

import pytest
import torch.distributed as dist
from parallel_runs import GATES, assert_same_training, train
from processes import on_processes

pytestmark = pytest.mark.distributed
FAMILIES = ("lm", "gnmt")
FACTORED = {"optim": "factored_adam", "expert_gradients": "factored", "weight_decay": 0.1}
# name: (family, keyword arguments of `train`)
CASES = {f"{family} {gate}": (family, {"gate": gate}) for family in FAMILIES for gate in GATES}
CASES |= {f"{family} tied": (family, {"tied": True}) for family in FAMILIES}
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
# Four processes do without copies what two do. What may differ is who has tokens and experts, and what is tied.
OF_FOUR = [name for name in CASES if not name.endswith((*GATES, "layers", "optimizer"))] + ["gnmt hierarchical"]
RUNS = [(layout, case) for layout in LAYOUTS for case in (OF_FOUR if layout == "four" else CASES)]
# Equal tokens tie in a strictly balanced gate. On CPUs without AVX-512 their rounding, and so the choice, follows the
# shape of a process's batch in this layout.
RUNS.remove(("four, two copies of each expert", "lm balanced"))


def train_all_cases(size, cases):
    return {name: train(CASES[name][0], layout=size, **CASES[name][1]) for name in cases}


@pytest.fixture(scope="module")
def runs():
    """{case: what each process recorded} of a layout; all its cases in one start of the processes."""
    made = {}

    def of_layout(layout):
        if layout not in made:
            num_processes, size = LAYOUTS[layout]
            cases = [case for other, case in RUNS if other == layout]
            results = on_processes(num_processes, train_all_cases, size, cases, timeout=300)
            made[layout] = {name: [result[name] for result in results] for name in cases}
        return made[layout]

    return of_layout


@pytest.fixture(scope="module")
def single():
    return {}


@pytest.mark.parametrize(("layout", "case"), RUNS)
def test_training_equals_a_single_process(runs, single, layout, case):
    parts = runs(layout)[case]
    family, arguments = CASES[case]
    if case not in single:
        single[case] = train(family, **arguments)
    assert all(part["sharded"] for part in parts) and not single[case]["sharded"]
    if GATES[arguments.get("gate", "softmax")] != GATES["balanced"]:
        assert min(single[case]["grad_norm"]) > 0.2  # clipping matters
    assert_same_training(parts, single[case])
    assert not dist.is_initialized()
