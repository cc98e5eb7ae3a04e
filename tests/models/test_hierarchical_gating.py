"""The hierarchical gate against the per-token reference, and its further guarantees."""

import warnings
from contextlib import nullcontext

import naive_moe
import pytest
import torch
from device_path import device_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    aligned,
    assert_same,
    dense,
    gradients,
    naive_dense,
    random_ids,
    randomize,
    tiny_lm,
    tiny_lm_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_hf import LstmMoeForCausalLM
from moe_hf.models.balancing import balancing_loss
from moe_hf.models.hierarchical_gating import HierarchicalGate

EPSILON = 0.05
WIDTH = 4
ON_DEVICE = pytest.mark.parametrize("on_device", [False, True])
HIERARCHY = {"num_experts": 12, "num_expert_groups": 4, "num_groups_per_tok": 2, "num_experts_per_tok": 4}


def hierarchical_gate(groups=4, per_group=3, k_groups=2, k_per_group=2, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one group or expert per token is tested here too
        gate = HierarchicalGate(
            WIDTH, groups * per_group, k_groups * k_per_group, groups, k_groups, noise_epsilon=EPSILON
        )
    return randomize(gate, seed).double()


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(gate, hidden, mask, seed, on_device=False):
    """The reference on the real tokens, with the gate's noise: by token, then by (group, token).

    On a device the gate also draws noise for padding, which comes last.
    """
    real = list(range(len(hidden))) if mask is None else mask.nonzero().flatten().tolist()
    parameters, groups, k_groups = dict(gate.named_parameters()), len(gate.weight), gate.primary.num_experts_per_tok
    tokens, noises = [hidden[t] for t in real], None
    if gate.training:
        torch.manual_seed(seed)
        primary_noise = torch.randn(len(hidden), groups, dtype=torch.float64)[real]
        primary = naive_moe.gate(
            tokens, gate.primary.weight, k_groups, gate.primary.noise_weight, primary_noise, EPSILON
        )
        pairs = sorted((group, t) for t, chosen in enumerate(primary.gates) for group in chosen)
        num_draws = len(hidden) * k_groups if on_device else len(pairs)
        draws = torch.randn(num_draws, gate.weight.shape[1], dtype=torch.float64)
        noises = primary_noise, {(t, group): noise for (group, t), noise in zip(pairs, draws)}
    return naive_moe.hierarchical_gate(tokens, parameters, k_groups, gate.num_chosen_per_group, noises, EPSILON)


def run(gate, hidden, mask=None, seed=7, on_device=False):
    expected = naive(gate, hidden, mask, seed, on_device)
    torch.manual_seed(seed)
    with device_path() if on_device else nullcontext():
        return gate(hidden, mask), expected


def check(gate, hidden, mask=None, seed=7, on_device=False):
    """Indices, weights, statistics, loss and all gradients are the reference's."""
    num_experts, real = gate.num_experts, slice(None) if mask is None else mask
    output, expected = run(gate, hidden.requires_grad_(), mask, seed, on_device)
    assert [set(row.tolist()) for row in output.top_k_index[real]] == [set(g) for g in expected.gates]
    assert (output.top_k_weights.diff(dim=-1) <= 0).all()
    assert_same(dense(output, num_experts)[real], naive_dense(expected, num_experts))
    assert_same(output.router_logits, hidden @ gate.primary.weight.T)
    assert_same(output.importance, expected.importance)
    assert_same(output.load, expected.load)
    assert output.tokens_per_expert.tolist() == expected.counts
    loss = balancing_loss(output.importance, output.load, 0.3, 0.2)
    expected_loss = naive_moe.balancing_loss(expected, 0.3, 0.2)
    assert_same(loss, expected_loss)

    probe = draw(seed + 2, len(hidden), num_experts)[real]
    inputs = {"hidden": hidden} | {
        name: parameter for name, parameter in gate.named_parameters() if gate.training or "noise" not in name
    }
    with device_path() if on_device else nullcontext():
        actual = gradients((dense(output, num_experts)[real] * probe).sum() + loss, inputs)
    expected_total = (naive_dense(expected, num_experts) * probe).sum() + expected_loss
    assert_same(actual, gradients(expected_total, inputs))
    return output, actual


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=12)
@given(
    tokens=st.integers(1, 6),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 999),
)
def test_gate_is_appendix_b_with_all_gradients(training, tokens, groups, per_group, k, seed):
    gate = hierarchical_gate(groups, per_group, min(k[0], groups), min(k[1], per_group), seed).train(training)
    check(gate, draw(seed + 1, tokens, WIDTH), seed=seed)


@ON_DEVICE
@pytest.mark.parametrize(("k_groups", "k_per_group"), [(2, 3), (4, 2), (4, 3)])
def test_every_expert_of_a_group_or_every_group_is_appendix_b_too(k_groups, k_per_group, on_device):
    gate = hierarchical_gate(k_groups=k_groups, k_per_group=k_per_group)
    check(gate, draw(1, 6, WIDTH), on_device=on_device)


@ON_DEVICE
@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=8)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=7).filter(any), seed=st.integers(0, 999))
def test_masked_tokens_are_neither_routed_nor_counted(training, on_device, mask, seed):
    gate, mask = hierarchical_gate(seed=seed).train(training), torch.tensor(mask)
    output, grads = check(gate, draw(seed, len(mask), WIDTH), mask, seed, on_device)
    assert (output.top_k_weights[~mask] == 0).all()
    assert ((output.top_k_index >= 0) & (output.top_k_index < 12)).all()
    assert (grads["hidden"][~mask] == 0).all()


@ON_DEVICE
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, torch.zeros(5, dtype=torch.bool)])
def test_without_any_token_all_is_zero_and_no_gradient_is_none(training, mask, on_device):
    gate = hierarchical_gate().train(training)
    with device_path() if on_device else nullcontext():
        output = gate(draw(0, 0 if mask is None else 5, WIDTH), mask)
    assert output.top_k_index.shape == output.top_k_weights.shape == (0 if mask is None else 5, 4)
    for statistic in (output.importance, output.load, output.tokens_per_expert):
        assert statistic.tolist() == [0] * 12
    inputs = {name: p for name, p in gate.named_parameters() if training or "noise" not in name}
    loss = output.top_k_weights.sum() + balancing_loss(output.importance, output.load, 1.0, 1.0)
    for grad in gradients(loss, inputs).values():
        assert (grad == 0).all()


@ON_DEVICE
def test_all_tokens_in_the_same_groups_leave_the_others_a_zero_gradient(on_device):
    gate = hierarchical_gate()
    gate.primary.weight.data[:] = torch.tensor([0.0, 50.0, -50.0, 45.0])[:, None]
    hidden = draw(0, 6, WIDTH).abs()
    output, grads = check(gate, hidden, on_device=on_device)
    counts_GM = output.tokens_per_expert.view(4, 3)
    assert counts_GM.sum(dim=1).tolist() == [0, 12, 0, 12]
    assert output.load.view(4, 3)[[0, 2]].abs().sum() == 0
    for name in ("weight", "noise_weight"):
        assert (grads[name][[0, 2]] == 0).all() and (grads[name][[1, 3]].abs().sum(dim=(1, 2)) > 0).all()


def test_load_alone_teaches_the_primary_gate():
    gate = hierarchical_gate()
    output, _ = run(gate, draw(0, 8, WIDTH))
    for grad in gradients(output.load.square().sum(), dict(gate.named_parameters())).values():
        assert grad.abs().sum() > 0


def test_importance_adds_up_to_the_tokens_and_the_counts_to_k_times_as_many():
    output, _ = run(hierarchical_gate(), draw(0, 8, WIDTH))
    assert_same(output.importance.sum(), torch.tensor(8.0).double())
    assert output.tokens_per_expert.sum() == 32


def test_evaluation_is_noiseless_and_its_load_the_token_counts():
    gate, hidden = hierarchical_gate(), draw(0, 20, WIDTH)
    first, second = gate.eval()(hidden), gate(hidden)
    assert torch.equal(first.top_k_weights, second.top_k_weights)
    assert torch.equal(first.load, first.tokens_per_expert)
    gate.train()
    assert not torch.equal(gate(hidden).top_k_weights, gate(hidden).top_k_weights)


def test_zero_initialised_gates_load_the_experts_equally():
    gate, tokens = HierarchicalGate(WIDTH, 12, 4, 4, 2), 4000
    assert all((parameter == 0).all() for parameter in gate.parameters())
    torch.manual_seed(0)
    output = gate(torch.randn(tokens, WIDTH))
    assert (output.tokens_per_expert / (tokens * 4 / 12) - 1).abs().max() < 0.15
    assert (output.load / (tokens * 4 / 12) - 1).abs().max() < 0.15


def test_statistics_are_left_out_when_not_needed():
    gate, hidden = hierarchical_gate().eval(), draw(0, 3, WIDTH)
    output = gate(hidden, None, False)
    assert (output.importance, output.load, output.tokens_per_expert) == (None, None, None)
    assert torch.equal(output.top_k_weights, gate(hidden).top_k_weights)


def test_gating_is_float32_under_autocast_and_with_bfloat16_weights():
    gate = hierarchical_gate().float()
    hidden = draw(0, 50, WIDTH).bfloat16()
    torch.manual_seed(7)
    plain = gate(hidden.float())
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = gate(hidden)
    for name in ("top_k_index", "top_k_weights", "router_logits", "importance", "load"):
        actual = getattr(output, name)
        assert actual.dtype == (torch.int64 if name == "top_k_index" else torch.float32)
        assert torch.equal(actual, getattr(plain, name)), name
    assert gate.bfloat16()(hidden).load.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Records the most elements that an operation's output has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return output


def test_cost_is_that_of_the_chosen_groups_forward_and_backward():
    tokens, groups, per_group = 64, 32, 32
    gate, hidden = hierarchical_gate(groups, per_group), draw(0, tokens, WIDTH).requires_grad_()
    with LargestTensor() as largest:
        output = gate(hidden)
        loss = output.top_k_weights.square().sum() + balancing_loss(output.importance, output.load, 0.1, 0.1)
        loss.backward()
    # The logits of two groups for each token, or the stacked weights; tokens * experts would be 65536.
    assert largest.numel == max(2 * tokens * per_group, groups * per_group * WIDTH) == 4096


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4, 3, 2), "num_expert_groups=3 does not divide num_experts=8"),
        ((8, 6, 2, 3), "num_groups_per_tok=3 must lie between 1 and num_expert_groups=2"),
        ((8, 3, 4, 2), "num_experts_per_tok=3 must be a multiple of num_groups_per_tok=2"),
        ((8, 6, 4, 2), "num_experts_per_tok / num_groups_per_tok=3 must lie .* num_experts / num_expert_groups=2"),
    ],
)
def test_impossible_sizes_are_refused_with_the_values(sizes, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalGate(WIDTH, *sizes)


@pytest.mark.parametrize(("sizes", "name"), [((8, 2, 4, 1), "num_groups_per_tok=1"), ((8, 2, 4, 2), "per_tok=1:")])
def test_a_level_without_choice_for_the_task_warns(sizes, name):
    with pytest.warns(UserWarning, match=f"{name}.* no gradient from the task"):
        HierarchicalGate(WIDTH, *sizes)


def test_whole_model_trains_generates_and_recomputes():
    model = LstmMoeForCausalLM(tiny_lm_config(**HIERARCHY)).train()
    assert all((p == 0).all() for name, p in model.named_parameters() if ".gate." in name)
    randomize(model)
    ids = random_ids(3, 6)

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    output, plain = step()
    assert output.aux_loss > 0 and all(grad.isfinite().all() for grad in plain.values())
    gate_names = {name.partition("gate.")[2] for name in plain if ".gate." in name}
    assert gate_names == {"weight", "noise_weight", "primary.weight", "primary.noise_weight"}
    model.activation_checkpointing_enable()
    recomputed_output, recomputed = step()
    assert_same(recomputed_output.loss, output.loss)
    assert_same(recomputed, plain)

    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert step()[0].loss < output.loss
    model.eval()
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (3, 10)


def test_router_logits_are_those_over_the_groups_once_per_layer():
    model = tiny_lm(layer_pattern=["lstm", "moe", "moe"], **HIERARCHY)
    output = model(random_ids(2, 5), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(10, 4)] * 2


def test_left_padding_changes_nothing():
    model, ids = tiny_lm(**HIERARCHY), random_ids(1, 5)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1), torch.tensor([[0] * 3 + [1] * 5])
    actual = model(padded, attention_mask=mask, labels=padded)
    expected = model(ids, labels=ids)
    assert_same(actual.logits[:, 3:], expected.logits)
    assert_same((actual.loss, actual.aux_loss), (expected.loss, expected.aux_loss))


def test_checkpoint_is_loaded_back(tmp_path):
    model, ids = tiny_lm(torch.float32, **HIERARCHY), random_ids(2, 4)
    model.save_pretrained(tmp_path)
    loaded = LstmMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)
