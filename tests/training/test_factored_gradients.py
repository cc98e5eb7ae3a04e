"""Experts with row gradients against experts with dense gradients, and against the formulas in float64."""

import copy

import pytest
import torch
from tiny_models import GNMT, LM, random_ids, tiny_lm
from tiny_training import ArrayStream, assert_same_bits, losses_of, noiseless_lm, tiny_arguments, tiny_trainer
from transformers import Trainer, TrainingArguments

from moe_hf import FactoredAdam, FactoredGradientsCallback, clip_grad_norm_, use_factored_gradients
from moe_hf.data.windows import StreamWindows
from moe_hf.errors import InputError
from moe_hf.models.factored_gradients import RowGradients, merge_rows, row_gradients
from moe_hf.training.optimizer import expert_parameters

GATES = {
    "flat": {},
    "hierarchical": {"num_experts": 6, "num_experts_per_tok": 4, "num_expert_groups": 2, "num_groups_per_tok": 2},
    "strictly balanced": {"gating": "strictly_balanced"},
    "softmax": {"gating": "softmax", "num_experts_per_tok": 5},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def pair(model):
    """Two equal models, each with its optimizer; the second has factored gradients."""
    models = [model.train(), copy.deepcopy(model).train()]
    for each in models:
        each.set_experts_implementation("moe_hf")
    use_factored_gradients(models[1])
    return models, [FactoredAdam.for_model(each, lr=1e-3, weight_decay=0.1) for each in models]


def batch(seed):
    ids = random_ids(3, 5, seed=seed)
    return {"input_ids": ids, "labels": ids}


def dense_gradients(model):
    """Of the experts, in the order of their parameters."""
    return [
        p.grad if p.grad is not None else sum(r.dense() for r in row_gradients(p)) for p in expert_parameters(model)
    ]


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("family", [LM, GNMT], ids=["lm", "gnmt"])
def test_outputs_and_other_gradients_are_the_same_bits(family, gate):
    (dense, factored), _ = pair(family.model(**GATES[gate]))
    for model in (dense, factored):
        torch.manual_seed(0)
        model(**batch(0)).loss.backward()
    experts = set(expert_parameters(factored))
    for (name, expected), actual in zip(dense.named_parameters(), factored.parameters()):
        if actual in experts:
            assert actual.grad is None, name
        else:
            assert torch.equal(actual.grad, expected.grad), name
    for actual, expected in zip(dense_gradients(factored), dense_gradients(dense)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def take_steps(models, optimizers, steps, micro=1, max_norm=float("inf")):
    """The same steps with each model; the norms of the last one's gradients."""
    norms = []
    for step in steps:
        for model, optimizer in zip(models, optimizers):
            torch.manual_seed(step)
            for number in range(micro):
                model(**batch(micro * step + number)).loss.backward()
            norm = clip_grad_norm_(model, max_norm)
            optimizer.step()
            optimizer.zero_grad()
        norms.append(norm)
    return norms


def assert_same_weights(models, atol):
    expected, actual = (model.state_dict() for model in models)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_hundred_clipped_and_accumulated_steps(gate, dtype):
    models, optimizers = pair(tiny_lm(dtype=dtype, std=0.3, **GATES[gate]))
    norms = take_steps(models, optimizers, range(100), micro=2, max_norm=0.5)
    assert min(norms) > 0.5  # so that clipping matters
    assert_same_weights(models, TOLERANCE[dtype])


def test_kernels_take_the_same_hundred_steps():
    """Widths of 16, which the compiled kernels support, if the kernels are installed."""
    models, optimizers = pair(tiny_lm(dtype=torch.float32, std=0.3, hidden_size=16, moe_intermediate_size=16))
    take_steps(models, optimizers, range(100), max_norm=0.5)
    assert_same_weights(models, TOLERANCE[torch.float32])


@pytest.mark.parametrize("changes", [{"recompute_experts": True}, {"num_experts": 40}], ids=str)
def test_recomputed_and_mostly_idle_experts(changes):
    models, optimizers = pair(tiny_lm(**changes))
    take_steps(models, optimizers, range(20))
    assert_same_weights(models, TOLERANCE[torch.float64])


def test_autocast_makes_the_same_outputs_and_steps():
    models, optimizers = pair(tiny_lm(dtype=torch.float32, std=0.3))
    for step in range(5):
        losses = []
        for model, optimizer in zip(models, optimizers):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch(step)).loss
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            assert torch.equal(*losses)
    for expected, actual in zip(*(model.state_dict().values() for model in models)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_state_is_loaded_bitwise():
    model = tiny_lm(num_experts=20)
    models, optimizers = pair(model)
    whole, optimizer = models[1], optimizers[1]

    take_steps([whole], [optimizer], range(5))
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    (_, resumed), (_, other) = pair(tiny_lm(num_experts=20))
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for each in ((whole, optimizer), (resumed, other)):
        take_steps(*([one] for one in each), range(5, 10))
    for expected, actual in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(actual, expected)


def test_dense_and_factored_steps_may_alternate():
    models, optimizers = pair(tiny_lm(num_experts=20))
    take_steps(models, optimizers, range(4))
    undo = use_factored_gradients(models[0])
    take_steps(models, optimizers, range(4, 8))
    undo()
    take_steps(models, optimizers, range(8, 12))
    assert_same_weights(models, TOLERANCE[torch.float64])


def test_norm_is_that_of_all_gradients():
    models, _ = pair(tiny_lm())
    for model in models:
        for seed in range(2):
            torch.manual_seed(seed)
            model(**batch(seed)).loss.backward()
    expected = sum(p.grad.square().sum() for p in models[0].parameters()).sqrt()
    for model in models:
        torch.testing.assert_close(clip_grad_norm_(model, float("inf")), expected, rtol=1e-12, atol=0)
        assert clip_grad_norm_(model, 0.1) > 0.1
        torch.testing.assert_close(clip_grad_norm_(model, 1.0), torch.tensor(0.1).double(), rtol=1e-4, atol=0)


def test_rows_stand_for_the_sum_of_outer_products():
    generator = torch.Generator().manual_seed(0)
    parts, expected = [], torch.zeros(6, 3, 4, dtype=torch.float64)
    for _ in range(3):
        counts = torch.randint(0, 9, (6,), generator=generator)
        left, right = (torch.randn(int(counts.sum()), n, generator=generator, dtype=torch.float64) for n in (3, 4))
        for expert, a, b in zip(torch.arange(6).repeat_interleave(counts).tolist(), left, right):
            expected[expert] += a[:, None] * b
        parts.append(RowGradients(left, right, counts))
    merged = merge_rows(parts)
    torch.testing.assert_close(merged.dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.squared_norm(), expected.square().sum(), rtol=1e-12, atol=0)


def test_rows_are_dropped_by_zero_grad_and_become_gradients_when_switched_back():
    model = tiny_lm().train()
    model.set_experts_implementation("moe_hf")
    optimizer = FactoredAdam.for_model(model)
    undo = use_factored_gradients(model)
    model(**batch(0)).loss.backward()
    optimizer.zero_grad()
    assert not any(row_gradients(p) for p in model.parameters())
    torch.manual_seed(0)
    model(**batch(0)).loss.backward()
    undo()
    factored = [p.grad for p in expert_parameters(model)]
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch(0)).loss.backward()
    for actual, expected in zip(factored, expert_parameters(model)):
        torch.testing.assert_close(actual, expected.grad, rtol=0, atol=1e-12)


def switched_on():
    model = tiny_lm().train()
    model.set_experts_implementation("moe_hf")
    use_factored_gradients(model)
    return model, expert_parameters(model)[0]


def test_another_optimizer_is_refused():
    model, _ = switched_on()
    model(**batch(0)).loss.backward()
    with pytest.raises(RuntimeError, match="AdamW cannot step experts with use_factored_gradients"):
        torch.optim.AdamW(model.parameters()).step()


def test_a_hook_is_refused():
    model, parameter = switched_on()
    parameter.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="a hook waits for the gradient of up_proj.*use_factored_gradients"):
        model(**batch(0))


def test_asking_for_the_gradient_is_refused_and_for_another_leaves_no_rows():
    model, parameter = switched_on()
    with pytest.raises(RuntimeError, match="use_factored_gradients never creates"):
        torch.autograd.grad(model(**batch(0)).loss, parameter)
    torch.autograd.grad(model(**batch(0)).loss, model.lm_head.weight)
    torch.autograd.grad(model(**batch(0)).loss, model.model.layers[0].parameters())
    assert not any(row_gradients(p) for p in model.parameters())


def test_other_experts_are_refused():
    with pytest.raises(ValueError, match="has no MoeExperts"):
        use_factored_gradients(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_expert_layers"):
        use_factored_gradients(tiny_lm(num_expert_layers=2))
    with pytest.raises(ValueError, match="experts_implementation='eager'"):
        use_factored_gradients(tiny_lm(experts="eager"))


def trained(folder, carry_state=False, **arguments):
    model = noiseless_lm(torch.float32, num_experts=8)
    model.set_experts_implementation("moe_hf")
    rows = StreamWindows(ArrayStream(24 * 7 + 1), 7, 8 if carry_state else None)
    arguments = {"optim": "factored_adam", "max_steps": 6, "learning_rate": 0.01, "max_grad_norm": 0.05} | arguments
    trainer = tiny_trainer(model, rows, folder, carry_state=carry_state, **arguments)
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


def norms_of(trainer):
    return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("carry_state", [False, True])
def test_trainer_learns_the_same(tmp_path, carry_state):
    kinds = ("dense", "factored")
    dense, factored = (trained(tmp_path / kind, carry_state, expert_gradients=kind) for kind in kinds)
    torch.testing.assert_close(losses_of(factored), losses_of(dense), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_of(factored), norms_of(dense), rtol=1e-4, atol=0)
    for expected, actual in zip(dense.model.state_dict().values(), factored.model.state_dict().values()):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def test_trainer_resumes_bitwise(tmp_path):
    arguments = {"expert_gradients": "factored", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "run", **arguments)
    resumed = trained(tmp_path / "run", **arguments, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())


def test_library_trainer_learns_the_same(tmp_path):
    def train(max_grad_norm, callbacks=()):
        model = noiseless_lm(torch.float32, num_experts=8)
        model.set_experts_implementation("moe_hf")
        optimizer = FactoredAdam.for_model(model, lr=0.01)
        args = TrainingArguments(
            str(tmp_path), max_steps=6, max_grad_norm=max_grad_norm, use_cpu=True, report_to="none"
        )
        args.save_strategy, args.disable_tqdm = "no", True
        rows = StreamWindows(ArrayStream(24 * 7 + 1), 7)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        Trainer(model, args, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=list(callbacks)).train()
        return model.state_dict()

    expected = train(0.05)
    actual = train(0, [FactoredGradientsCallback(max_grad_norm=0.05)])
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="max_grad_norm=1.0 would clip without the experts"):
        train(1.0, [FactoredGradientsCallback()])


def test_another_optimizer_of_the_arguments_is_refused(tmp_path):
    with pytest.raises(InputError, match="expert_gradients=factored needs optim="):
        tiny_arguments(tmp_path, optim="adamw_torch", expert_gradients="factored")


def test_a_compiled_model_leaves_the_same_rows():
    models, _ = pair(tiny_lm())
    for model in (models[0], torch.compile(models[1], backend="aot_eager")):
        torch.manual_seed(0)
        model(**batch(0)).loss.backward()
    for actual, expected in zip(dense_gradients(models[1]), dense_gradients(models[0])):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
