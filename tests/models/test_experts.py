"""The experts and their implementations against the per-token reference."""

import naive_moe
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, gradients, randomize, tiny_lm, tiny_lm_config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_hf import LstmMoeForCausalLM
from moe_hf.models import native_experts, segment_experts
from moe_hf.models.experts import MoeExperts
from moe_hf.models.segment_experts import _experts, _fill_segments

LIBRARY_IMPLEMENTATIONS = ["batched_mm", "grouped_mm"]
IMPLEMENTATIONS = ["eager", "moe_hf", *LIBRARY_IMPLEMENTATIONS]
OURS = pytest.mark.parametrize("implementation", ["eager", "moe_hf"])
NATIVE = pytest.mark.skipif(native_experts.library() is None, reason="the package was installed without a compiler")


def experts(implementation="eager", dtype=torch.float64, seed=0, **changes):
    config = tiny_lm_config(**changes)
    config._experts_implementation = implementation
    return randomize(MoeExperts(config), seed).to(dtype)


def routing(tokens, k=2, num_experts=5, seed=0, dtype=torch.float64):
    """Hidden states, k different experts per token, weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 8, generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    index = scores.topk(k, dim=-1).indices
    return hidden.requires_grad_(), index, scores.gather(1, index).softmax(-1).to(dtype).requires_grad_()


def naive(module, hidden, index, weights):
    mid = () if module.mid_proj is None else module.mid_proj
    rows = []
    for x, ids, values in zip(hidden, index.tolist(), weights):
        rows.append(naive_moe.mix_experts(x, dict(zip(ids, values)), module.up_proj, module.down_proj, mid))
    return torch.stack(rows)


def run(module, hidden, index, weights):
    """Output, and all gradients under a fixed probe."""
    output = module(hidden, index, weights)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, gradients((output * probe).sum(), inputs_of(module, hidden, weights))


def inputs_of(module, hidden, weights):
    return {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}


@pytest.mark.parametrize(("implementation", "num_expert_layers"), [("eager", 1), ("eager", 3), ("moe_hf", 1)])
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(1, 7), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_output_is_the_papers_with_all_gradients(implementation, num_expert_layers, tokens, k, seed):
    module = experts(implementation, num_expert_layers=num_expert_layers, moe_intermediate_size=6)
    hidden, index, weights = routing(tokens, k, seed=seed)
    output, grads = run(module, hidden, index, weights)
    expected = naive(module, hidden, index, weights)
    assert_same(output, expected)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    assert_same(grads, gradients((expected * probe).sum(), inputs_of(module, hidden, weights)))


@pytest.mark.parametrize("num_idle", [0, 40], ids=["all experts visited", "few of them"])
def test_segments_are_the_papers_with_many_and_with_few_of_the_experts_visited(num_idle):
    module = experts("moe_hf", num_experts=4 + num_idle)
    hidden, _, weights = routing(20, k=2)
    index = torch.tensor([[3, 1]] * 3 + [[1, 2]] * 17)  # 20, 17 and 3 rows
    expected = naive(module, hidden, index, weights)
    assert_same(run(module, hidden, index, weights)[0], expected)
    with torch.no_grad():
        assert_same(module(hidden, index, weights), expected)


@pytest.mark.parametrize("limit", [0, pytest.param(4, marks=NATIVE)], ids=["products", "kernels for up to 4 rows"])
@pytest.mark.parametrize("elements", [1, 32 * 12, 2**19], ids=["one expert", "up to 12 rows", "all"])
def test_gradients_are_the_papers_in_groups_of_any_size(elements, limit, monkeypatch):
    monkeypatch.setattr(segment_experts, "_GROUP_ELEMENTS", elements)
    monkeypatch.setattr(segment_experts, "few_rows", lambda *_: limit)
    module = experts("moe_hf", torch.float32, num_experts=8, hidden_size=16, moe_intermediate_size=16)
    hidden, _, weights = routing(20, k=2, dtype=torch.float32)
    hidden = torch.cat([hidden, hidden.square()], dim=1).detach().requires_grad_()
    # 4, 8, 5, 0, 1, 13, 7 and 2 rows
    index = torch.tensor([[0, 1]] * 4 + [[1, 2]] * 4 + [[2, 4]] + [[5, 6]] * 7 + [[5, 7]] * 2 + [[5, 8]] * 2)
    weights = weights.detach().masked_fill(index == 8, 0).requires_grad_()
    output, grads = run(module, hidden, index, weights)
    module, hidden, weights = module.double(), hidden.detach().double(), weights.detach().double()
    inputs = hidden.requires_grad_(), index.masked_fill(index == 8, 0), weights.requires_grad_()
    expected = naive(module, *inputs)
    probe = torch.linspace(-1, 1, output.numel()).view_as(output)
    expected_grads = gradients((expected * probe).sum(), inputs_of(module, inputs[0], inputs[2]))
    expected_grads["weights"] = expected_grads["weights"] * (inputs[2] != 0)  # a slot of weight 0 is skipped
    assert_same(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same({name: grad.double() for name, grad in grads.items()}, expected_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", LIBRARY_IMPLEMENTATIONS)
def test_library_implementations_are_called_and_agree_with_eager(implementation, monkeypatch):
    calls = []
    original = ALL_EXPERTS_FUNCTIONS[implementation]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, implementation, lambda *args: calls.append(1) or original(*args))
    inputs = routing(9, dtype=torch.float32)
    expected, expected_grads = run(experts(dtype=torch.float32), *inputs)
    assert not calls
    output, grads = run(experts(implementation, dtype=torch.float32), *inputs)
    assert calls == [1]
    assert_same(output, expected, rtol=1e-5, atol=1e-5)
    assert_same(grads, expected_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_has_a_zero_gradient(implementation):
    module = experts(implementation, torch.float32, num_expert_layers=1)
    hidden, index, weights = routing(6, num_experts=3, dtype=torch.float32)
    _, grads = run(module, hidden, index, weights)
    for name in ("up_proj", "down_proj"):
        assert grads[name][:3].abs().amax(dim=(1, 2)).min() > 0
        assert grads[name][3:].abs().max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_tokens_may_go_to_one_expert(implementation):
    module = experts(implementation, torch.float32)
    hidden, _, _ = routing(6, dtype=torch.float32)
    output, _ = run(module, hidden, torch.full((6, 1), 4), torch.ones(6, 1, requires_grad=True))
    expected = torch.relu(hidden @ module.up_proj[4].T) @ module.down_proj[4].T
    assert_same(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("implementation", "num_expert_layers"), [("eager", 1), ("eager", 2), ("moe_hf", 1)])
def test_no_tokens_give_no_rows_and_zero_gradients(implementation, num_expert_layers):
    module = experts(implementation, num_expert_layers=num_expert_layers)
    output, grads = run(module, *routing(0))
    assert output.shape == (0, 8)
    for name in dict(module.named_parameters()):
        assert grads[name].abs().max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_of_weight_zero_change_nothing(implementation):
    module = experts(implementation, torch.float32)
    hidden, index, weights = routing(6, k=3, dtype=torch.float32)
    unused = torch.tensor([False, False, True]).expand(6, 3)
    output, grads = run(module, hidden, index, weights.detach().masked_fill(unused, 0).requires_grad_())
    expected, expected_grads = run(module, hidden, index[:, :2], weights[:, :2].detach().requires_grad_())
    assert_same(output, expected, rtol=1e-5, atol=1e-6)
    for name in ("hidden", "up_proj", "down_proj"):
        assert_same(grads[name], expected_grads[name], rtol=1e-5, atol=1e-5)


@OURS
def test_an_id_of_another_rank_is_left_out(implementation):
    module = experts(implementation)
    hidden, index, weights = routing(6)
    here = torch.tensor([True, False]).expand(6, 2)
    elsewhere = weights.detach().masked_fill(~here, 0).requires_grad_()
    output, grads = run(module, hidden, index.masked_fill(~here, 5), elsewhere)
    expected, expected_grads = run(module, hidden, index[:, :1], weights[:, :1].detach().requires_grad_())
    assert_same(output, expected)
    assert (grads.pop("weights")[:, 1] == 0).all()
    expected_grads.pop("weights")
    assert_same(grads, expected_grads)


@OURS
def test_a_rank_without_any_token_has_zero_gradients(implementation):
    module = experts(implementation)
    hidden, index, weights = routing(6)
    output, grads = run(module, hidden, torch.full_like(index, 5), torch.zeros_like(weights, requires_grad=True))
    assert output.abs().max() == 0
    assert max(grad.abs().max() for grad in grads.values()) == 0


@OURS
@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(6)))
def test_permuting_tokens_permutes_outputs(implementation, order):
    module = experts(implementation)
    hidden, index, weights = routing(6)
    output = module(hidden, index, weights)
    assert_same(module(hidden[order], index[order], weights[order]), output[order])


@OURS
def test_swapping_a_tokens_slots_changes_nothing(implementation):
    module = experts(implementation)
    hidden, index, weights = routing(6)
    assert_same(module(hidden, index.flip(1), weights.flip(1)), module(hidden, index, weights))


def test_gradcheck_of_segments():
    module = experts("moe_hf", moe_intermediate_size=3, num_experts=3)
    hidden, index, weights = routing(4, num_experts=3)

    def call(hidden, weights, up_proj, down_proj):
        parameters = {"up_proj": up_proj, "down_proj": down_proj}
        return torch.func.functional_call(module, parameters, (hidden, index, weights))

    assert torch.autograd.gradcheck(call, (hidden, weights, module.up_proj, module.down_proj))


@pytest.mark.slow
def test_segments_are_one_operation_for_the_compiler():
    torch.library.opcheck(_experts, (*routing_arguments(), True))
    torch.library.opcheck(_experts, (*(tensor.detach() for tensor in routing_arguments()), False))


def routing_arguments():
    module = experts(dtype=torch.float32)
    hidden, index, weights = routing(6, dtype=torch.float32)
    return hidden, index, weights, module.up_proj, module.down_proj


def test_segments_keep_nothing_without_gradients():
    arguments = [tensor.detach() for tensor in routing_arguments()]
    output, hidden, _, _ = _experts(*arguments, False)
    assert hidden.numel() == 0
    assert torch.equal(output, _experts(*arguments, True)[0])


def test_gradcheck_of_eager():
    module = experts(moe_intermediate_size=3, num_experts=3, num_expert_layers=2)
    hidden, index, weights = routing(3, num_experts=3)

    def call(hidden, weights, up_proj, mid_proj, down_proj):
        parameters = {"up_proj": up_proj, "mid_proj": mid_proj, "down_proj": down_proj}
        return torch.func.functional_call(module, parameters, (hidden, index, weights))

    assert torch.autograd.gradcheck(call, (hidden, weights, module.up_proj, module.mid_proj, module.down_proj))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_autocast_is_close_to_float32(implementation):
    module = experts(implementation, torch.float32)
    hidden, index, weights = routing(9, dtype=torch.float32)
    expected, expected_grads = run(experts(dtype=torch.float32), hidden, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, grads = run(module, hidden, index, weights)
    assert output.dtype == torch.float32
    assert_same(output, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_same(grad, expected_grads[name], rtol=0, atol=0.03 * expected_grads[name].abs().max().item())


def test_the_activation_is_the_configured_one():
    module = experts(hidden_act="tanh")
    hidden, _, _ = routing(4)
    output = module(hidden, torch.full((4, 1), 2), torch.ones(4, 1).double())
    assert_same(output, torch.tanh(hidden @ module.up_proj[2].T) @ module.down_proj[2].T)


@pytest.mark.parametrize("implementation", ["moe_hf", *LIBRARY_IMPLEMENTATIONS])
def test_deep_experts_refuse_an_implementation_of_one_layer(implementation):
    config = tiny_lm_config(num_expert_layers=2)
    config._experts_implementation = None
    model = LstmMoeForCausalLM(config)
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match=f"experts_implementation='{implementation}'.*num_expert_layers=2"):
        model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=f"experts_implementation='{implementation}'.*num_expert_layers=2"):
        LstmMoeForCausalLM._from_config(tiny_lm_config(num_expert_layers=2), experts_implementation=implementation)


def test_the_default_is_ours_for_relu_experts_of_any_size():
    config = tiny_lm_config(moe_intermediate_size=6)
    config._experts_implementation = None
    assert LstmMoeForCausalLM(config).config._experts_implementation == "moe_hf"
    config = tiny_lm_config(hidden_act="tanh")
    config._experts_implementation = None
    model = LstmMoeForCausalLM(config)
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="experts_implementation='moe_hf' computes ReLU units, but hidden_act='tanh'"):
        model.set_experts_implementation("moe_hf")


@pytest.mark.parametrize("implementation", ["moe_hf", *LIBRARY_IMPLEMENTATIONS])
def test_the_whole_model_agrees_under_every_implementation(implementation, monkeypatch):
    calls = []
    original = ALL_EXPERTS_FUNCTIONS[implementation]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, implementation, lambda *args: calls.append(1) or original(*args))
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    expected = tiny_lm(torch.float32)(input_ids).logits
    assert not calls
    assert_same(tiny_lm(torch.float32, experts=implementation)(input_ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert calls


def test_an_unknown_activation_is_named():
    with pytest.raises(StrictDataclassError, match="hidden_act='nope' is not known, use one of .*relu"):
        experts(hidden_act="nope")


@settings(deadline=None, max_examples=10)
@given(tokens=st.integers(1, 90), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_zero_rows_that_fill_segments_change_nothing(tokens, k, seed):
    module = experts("moe_hf", num_experts=7)
    hidden, index, weights = routing(tokens, k, seed=seed)  # leaves two experts idle
    with torch.no_grad():
        weights[::3, 0] = 0
    filled = _fill_segments(hidden, index, weights, 7)
    counts = filled[1][filled[2] != 0].bincount(minlength=8)[:7]
    used = index[weights != 0].bincount(minlength=7)
    assert ((counts - used >= 0) & (counts - used < 32)).all()
    assert (counts % 32 == 0).all() and (counts[used == 0] == 0).all()

    output, grads = run(module, hidden, index, weights)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    of_filled = module(*filled)
    assert_same(of_filled[:tokens], output)
    assert of_filled[tokens:].abs().max() == 0
    assert_same(gradients((of_filled[:tokens] * probe).sum(), inputs_of(module, hidden, weights)), grads)


def test_products_in_half_precision_have_few_different_shapes(monkeypatch):
    """oneDNN generates code for each number of rows; this took over half of a bfloat16 training's time."""
    module = experts("moe_hf", torch.float32)
    hidden, index, weights = routing(400, dtype=torch.float32)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(max(a.shape)) or mm(a, b, out=out))
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = run(module, hidden, index, weights)
        assert len(products) == 5 * 6 and all(rows % 32 == 0 for rows in products)
        monkeypatch.setattr(segment_experts, "_MIN_ROWS_TO_FILL", len(hidden))
        expected, expected_grads = run(module, hidden, index, weights)
    assert any(rows % 32 for rows in products[30:])
    for actual, exact in ((output, expected), *((grads[name], expected_grads[name]) for name in grads)):
        assert (actual - exact).norm() <= 5e-3 * exact.norm()
