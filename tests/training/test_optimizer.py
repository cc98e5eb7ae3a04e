"""The optimizer of appendix D against a slow loop over the experts, torch's AdamW and Transformers' Adafactor."""

import io
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_training import ArrayStream, assert_same_bits, losses_of, noiseless_lm, tiny_arguments, tiny_trainer
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from moe_hf import LstmMoeConfig, MoeExperts
from moe_hf.data.windows import StreamWindows
from moe_hf.training import dense_step
from moe_hf.training import optimizer as optimizer_module
from moe_hf.training.optimizer import FactoredAdam, create_factored_adam, expert_parameters, state_bytes

EXACT = dict(rtol=1e-10, atol=1e-12)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape, seed=0, dtype=torch.float64):
    return torch.nn.Parameter(draw(*shape, seed=seed, dtype=dtype))


def steps(optimizer, params, gradients, learning_rates=None):
    """One optimizer step for each list of gradients."""
    for t, grads in enumerate(gradients):
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.to(param.dtype)
        if learning_rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[t]
        optimizer.step()


def naive_matrix(matrix, gradients, learning_rates, beta2, eps, weight_decay):
    """The formulas for one expert's matrix, element by element, in Python's floats."""
    num_rows, num_cols = matrix.shape
    p = matrix.tolist()
    row, col = [0.0] * num_rows, [0.0] * num_cols
    for t, (gradient, lr) in enumerate(zip(gradients, learning_rates), start=1):
        g = gradient.tolist()
        for i in range(num_rows):
            row[i] = beta2 * row[i] + (1 - beta2) * sum(x * x for x in g[i]) / num_cols
        for j in range(num_cols):
            col[j] = beta2 * col[j] + (1 - beta2) * sum(g[i][j] ** 2 for i in range(num_rows)) / num_rows
        mean = sum(row) / num_rows
        for i in range(num_rows):
            a = math.sqrt(row[i] / mean) if mean > 0 else 0.0
            for j in range(num_cols):
                b = math.sqrt(col[j] / (1 - beta2**t))
                p[i][j] = p[i][j] * (1 - lr * weight_decay) - lr * g[i][j] / ((a + eps) * (b + eps))
    return torch.tensor(p, dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(
    leading=st.sampled_from([(), (1,), (4,), (2, 3)]),
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    beta2=st.sampled_from([0.0, 0.9, 0.999]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    idle=st.integers(0, 15),
    seed=st.integers(0, 999),
)
def test_step_is_the_formula_for_every_matrix(leading, rows, cols, beta2, weight_decay, idle, seed):
    """Also with idle experts (bit t of `idle`: the last is idle at step t) and a learning rate that changes."""
    param = parameter(*leading, rows, cols, seed=seed)
    start = param.detach().reshape(-1, rows, cols).clone()
    gradients = [draw(*leading, rows, cols, seed=seed + 1 + t) for t in range(4)]
    for t, gradient in enumerate(gradients):
        if idle >> t & 1:
            gradient.view(-1, rows, cols)[-1] = 0
    learning_rates = [0.1, 0.3, 0.05, 0.2]
    optimizer = FactoredAdam([param], betas=(0.9, beta2), eps=1e-6, weight_decay=weight_decay, factored=True)
    steps(optimizer, [param], [[gradient] for gradient in gradients], learning_rates)
    for index, matrix in enumerate(start):
        history = [gradient.view(-1, rows, cols)[index] for gradient in gradients]
        expected = naive_matrix(matrix, history, learning_rates, beta2, 1e-6, weight_decay)
        torch.testing.assert_close(param.detach().view(-1, rows, cols)[index], expected, **EXACT)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), weight_decay=st.sampled_from([0.0, 0.1]))
@example(seed=337, weight_decay=0.0)  # gradients of 1e-8, for which an eps of 1e-16 would matter
def test_squared_gradients_of_rank_one_make_it_adam_without_first_moment(seed, weight_decay):
    param, reference = parameter(3, 4, 5, seed=seed), parameter(3, 4, 5, seed=seed)
    rank_one = draw(3, 4, 1, seed=seed + 1) * draw(3, 1, 5, seed=seed + 2)
    # Signs and sizes change at each step, but the moving average of the squares keeps rank one.
    gradients = [[rank_one * draw(3, 4, 5, seed=t).sign() * draw(3, 1, 1, seed=t)] for t in range(6)]
    options = dict(lr=0.1, eps=1e-30, weight_decay=weight_decay)
    steps(FactoredAdam([param], betas=(0.9, 0.99), factored=True, **options), [param], gradients)
    steps(torch.optim.AdamW([reference], betas=(0.0, 0.99), **options), [reference], gradients)
    torch.testing.assert_close(param, reference, **EXACT)


def test_adafactor_of_transformers_is_the_same_only_when_its_decay_is_set_anew_at_each_step():
    param, other, constant = (parameter(3, 4, 5) for _ in range(3))
    gradients = [[draw(3, 4, 5, seed=t)] for t in range(1, 7)]
    steps(FactoredAdam([param], lr=0.1, betas=(0.9, 0.99), eps=1e-15, factored=True), [param], gradients)
    switches = dict(lr=0.1, eps=(0.0, 0.0), clip_threshold=math.inf, scale_parameter=False, relative_step=False)
    adafactor = Adafactor([other], **switches)
    for t, grads in enumerate(gradients, start=1):
        if t > 1:
            adafactor.param_groups[0]["decay_rate"] = math.log(0.01 / (1 - 0.99**t)) / math.log(t)
        steps(adafactor, [other], [grads])
    torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-5)  # it computes in float32
    steps(Adafactor([constant], decay_rate=-0.8, **switches), [constant], gradients)
    assert (param - constant).abs().max() > 0.01


def test_other_groups_are_adamw_to_the_bit():
    shapes = [(4, 3), (5,), (2, 3, 4)]
    params, reference = ([parameter(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    gradients = [[draw(*shape, seed=t) for shape in shapes] for t in range(4)]
    gradients[1][2] = None
    options = dict(betas=(0.8, 0.95), eps=1e-6)
    groups = [[{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}] for p in (params, reference)]
    steps(FactoredAdam(groups[0], weight_decay=0.01, **options), params, gradients, [0.1, 0.2, 0.3, 0.1])
    adamw = torch.optim.AdamW(groups[1], weight_decay=0.01, fused=True, **options)
    steps(adamw, reference, gradients, [0.1, 0.2, 0.3, 0.1])
    for param, expected in zip(params, reference):
        assert torch.equal(param, expected)


def test_each_group_has_its_own_rule_and_rate():
    factored, rest = parameter(2, 3, 4), parameter(2, 3, 4)
    alone, adam = parameter(2, 3, 4), parameter(2, 3, 4)
    gradients = [draw(2, 3, 4, seed=t) for t in range(3)]
    both = FactoredAdam([{"params": [factored], "factored": True, "lr": 0.3}, {"params": [rest]}], lr=0.1)
    steps(both, [factored, rest], [[g, g] for g in gradients])
    steps(FactoredAdam([alone], lr=0.3, factored=True), [alone], [[g] for g in gradients])
    steps(torch.optim.AdamW([adam], lr=0.1, weight_decay=0.0), [adam], [[g] for g in gradients])
    torch.testing.assert_close(factored, alone, rtol=0, atol=0)
    torch.testing.assert_close(rest, adam, **EXACT)


def test_an_expert_that_never_had_a_token_stays_and_the_moments_of_an_idle_one_decay():
    param = parameter(3, 4, 5, dtype=torch.float32)
    start = param.detach().clone()
    optimizer = FactoredAdam([param], lr=0.1, factored=True)
    gradient = draw(3, 4, 5, seed=1)
    gradient[0] = 0
    steps(optimizer, [param], [[gradient]])
    after, row = param.detach().clone(), optimizer.state[param]["row"].clone()
    assert torch.equal(after[0], start[0]) and (after[1:] != start[1:]).all()
    steps(optimizer, [param], [[torch.zeros(3, 4, 5)]])
    assert torch.equal(param, after)
    torch.testing.assert_close(optimizer.state[param]["row"], 0.999 * row)


def test_tiny_gradients_do_not_underflow_the_product_of_the_factors():
    param = torch.nn.Parameter(torch.zeros(1, 2, 2))
    optimizer = FactoredAdam([param], lr=0.1, betas=(0.0, 0.9), eps=1e-30, factored=True)
    steps(optimizer, [param], [[torch.full((1, 2, 2), 1e-16)]])  # R C = 1e-66 is 0 in float32
    torch.testing.assert_close(param.detach(), torch.full((1, 2, 2), -0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(7, 6, 5), (2, 7, 6, 5)])
def test_cutting_into_pieces_changes_nothing(shape, monkeypatch):
    results = []
    for chunk_bytes in (2 * 6 * 5 * 8, 4 * 5 * 8, 1, 2**19):  # two matrices, four rows, one row, all
        monkeypatch.setitem(dense_step.CHUNK_BYTES, "cpu", chunk_bytes)
        param = parameter(*shape)
        steps(FactoredAdam([param], factored=True), [param], [[draw(*shape, seed=t)] for t in range(3)])
        results.append(param.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


def test_parameters_without_gradient_are_left_alone():
    params = [parameter(2, 3, 4), parameter(3)]
    start = [param.detach().clone() for param in params]
    optimizer = FactoredAdam([{"params": params[:1], "factored": True}, {"params": params[1:]}], weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, start)) and not optimizer.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_updated_in_float32(dtype):
    param = parameter(3, 4, 5, dtype=dtype)
    reference = torch.nn.Parameter(param.detach().float())
    gradient = draw(3, 4, 5, seed=1, dtype=dtype)
    optimizer = FactoredAdam([param], lr=0.1, factored=True)
    expected = FactoredAdam([reference], lr=0.1, factored=True)
    steps(optimizer, [param], [[gradient]])
    steps(expected, [reference], [[gradient]])
    assert torch.equal(param, reference.to(dtype))
    for name in ("row", "col"):
        assert torch.equal(optimizer.state[param][name], expected.state[reference][name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_state_goes_on_with_the_same_bits(dtype):
    gradients = [[draw(3, 4, 5, seed=t), draw(4, seed=t)] for t in range(6)]

    def build():
        params = [parameter(3, 4, 5, dtype=dtype), parameter(4, dtype=dtype)]
        return params, FactoredAdam([{"params": params[:1], "factored": True}, {"params": params[1:]}], lr=0.1)

    whole_params, whole = build()
    steps(whole, whole_params, gradients)
    first_params, first = build()
    steps(first, first_params, gradients[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    params, second = build()
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for param, value in zip(params, first_params):
            param.copy_(value)
    steps(second, params, gradients[3:])
    assert_same_bits([param.detach() for param in params], [param.detach() for param in whole_params])
    assert_same_bits(second.state_dict(), whole.state_dict())


def test_state_of_experts_is_below_one_per_cent_of_their_bytes():
    config = LstmMoeConfig(hidden_size=512, moe_intermediate_size=1024, num_experts=4)
    params = list(MoeExperts(config).parameters())
    optimizer = FactoredAdam(params, factored=True)
    steps(optimizer, params, [[torch.ones_like(param) for param in params]])
    share = state_bytes(optimizer, params) / sum(param.nbytes for param in params)
    assert share == pytest.approx(1 / 512 + 1 / 1024) and share < 0.01
    adam = torch.optim.AdamW(params, fused=True)
    adam.step()
    assert state_bytes(adam, params) == 2 * sum(param.nbytes for param in params) + 2 * 4  # and two step counters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, r"lr=-1.0 must not be negative"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1 must not be negative"),
        ({"eps": 0.0}, r"eps=0.0 must be at least 1e-38"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be at least 0 and below 1"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FactoredAdam([parameter(2, 3, 4)], factored=True, **changes)


def test_a_factored_vector_is_refused():
    with pytest.raises(ValueError, match=r"factored=True needs matrices \(..., H, D\), not the shape \(3,\)"):
        FactoredAdam([{"params": [parameter(3)], "factored": True}])


class KeepGroups(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.groups = [{**group, "params": set(group["params"])} for group in optimizer.param_groups]


def test_model_gets_a_factored_group_of_its_experts_with_the_arguments_values(tmp_path):
    model = noiseless_lm(num_expert_layers=2)
    args = tiny_arguments(
        tmp_path, optim="factored_adam", learning_rate=0.01, adam_beta2=0.97, adam_epsilon=1e-7, weight_decay=0.1
    )
    model.lm_head.weight.requires_grad_(False)
    decayed = [name for name, _ in model.named_parameters() if "bias" not in name]
    groups = create_factored_adam(model, args, decayed).param_groups
    experts = model.model.layers[1].experts
    factored = [group for group in groups if group["factored"]]
    assert [set(group["params"]) for group in factored] == [{experts.up_proj, experts.mid_proj, experts.down_proj}]
    assert set(expert_parameters(model)) == set(factored[0]["params"])
    in_groups = [param for group in groups for param in group["params"]]
    assert sorted(map(id, in_groups)) == sorted(id(param) for param in model.parameters() if param.requires_grad)
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.9, 0.97), 1e-7)
        biases = {param for name, param in model.named_parameters() if "bias" in name}
        assert group["weight_decay"] == (0.0 if set(group["params"]) & biases else 0.1)


def test_trainer_builds_the_optimizer_that_is_named_and_says_how_large_it_is(tmp_path, caplog):
    caplog.set_level("INFO", logger="moe_hf")
    model, seen = noiseless_lm(torch.float32), KeepGroups()
    trainer = tiny_trainer(
        model,
        StreamWindows(ArrayStream(41), 5, None),
        tmp_path,
        callbacks=[seen, optimizer_module.OptimizerSizeCallback()],
        optim="factored_adam",
        weight_decay=0.1,
        learning_rate=0.05,
        num_train_epochs=12,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, FactoredAdam)
    assert [group["params"] for group in seen.groups if group["factored"]] == [set(expert_parameters(model))]
    losses = losses_of(trainer)
    assert losses[-1] < 0.6 * losses[0]
    # 2 * 4 matrices of 8 x 8 need (8 + 8) / (8 * 8). All other weights have Adam's two moments and 4-byte counters.
    lines = [line for line in caplog.messages if line.startswith("optimizer state")]
    assert lines[0] == "optimizer state, experts: 0.00 MB, 25.00 % of the parameters' bytes"
    assert len(lines) == 2 and lines[1].startswith("optimizer state, rest: ")
    assert 200 < float(lines[1].split()[-6]) < 202
