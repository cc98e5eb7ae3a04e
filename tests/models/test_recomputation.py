"""Recomputing the experts in the backward pass (appendix D) gives the same gradients with less memory."""

import pytest
import torch
from tiny_models import assert_same, random_ids, randomize, tiny_lm, tiny_lm_config

from moe_hf import LstmMoeForCausalLM
from moe_hf.models.moe import MoeBlock

KINDS = {
    "flat": {},
    "hierarchical": {"num_experts": 6, "num_expert_groups": 3, "num_experts_per_tok": 4},
    "softmax": {"gating": "softmax", "num_experts_per_tok": None},
    "deep experts": {"num_expert_layers": 3},
}


def losses_and_gradients(recompute, kind="flat", experts="eager", layers_kwargs=None, autocast=False, **changes):
    """A training step with dropout and gating noise, left- and right-padded rows, and labels."""
    changes = {"dropout": 0.2, "layer_pattern": ["lstm", "moe", "lstm", "moe"]} | KINDS[kind] | changes
    model = tiny_lm(torch.float32, experts=experts, recompute_experts=recompute, **changes).train()
    if layers_kwargs is not None:
        model.activation_checkpointing_enable(layers_kwargs)
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :2], mask[1, 5:] = 0, 0
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(ids, attention_mask=mask, labels=ids)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers_kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_the_same_bits(kind, layers_kwargs, autocast):
    expected = losses_and_gradients(False, kind, autocast=autocast)
    actual = losses_and_gradients(True, kind, layers_kwargs=layers_kwargs, autocast=autocast)
    assert expected["model.layers.1.experts.up_proj"].abs().max() > 0
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("layers_kwargs", [None, {"use_reentrant": False}])
def test_library_implementations_recompute_too(experts, layers_kwargs):
    expected = losses_and_gradients(False, experts=experts)
    # Not by bits: the backward of their gather may add up in any order.
    actual = losses_and_gradients(True, experts=experts, layers_kwargs=layers_kwargs)
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)


def calls_of_experts(module, hidden, context=torch.enable_grad):
    calls = []
    handle = module.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    with context():
        output = module(hidden)[0]
        forward = len(calls)
        if output.requires_grad:
            output.sum().backward()
    handle.remove()
    return forward, len(calls) - forward


@pytest.mark.parametrize("training", [True, False])
def test_experts_are_computed_again_in_the_backward_pass_only_when_asked_and_needed(training):
    hidden = torch.randn(2, 6, 8)
    for recompute in (False, True):
        module = randomize(MoeBlock(tiny_lm_config(recompute_experts=recompute))).train(training)
        assert calls_of_experts(module, hidden) == (1, int(recompute))
        assert calls_of_experts(module, hidden, torch.no_grad) == (1, 0)


def kept_bytes(experts="eager", **changes):
    """Bytes that one MoE block keeps for its backward pass, each storage once, without parameters and inputs."""
    config = tiny_lm_config(hidden_size=16, moe_intermediate_size=64, num_experts_per_tok=4, **changes)
    config._experts_implementation = experts
    module, hidden = randomize(MoeBlock(config)), torch.randn(4, 32, 16)
    own = {tensor.untyped_storage().data_ptr() for tensor in (hidden, *module.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(hidden)[0]
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("experts", ["eager", "moe_hf", "grouped_mm", "batched_mm"])
def test_less_is_kept_for_the_backward_pass(experts):
    usual, recomputed = kept_bytes(experts), kept_bytes(experts, recompute_experts=True)
    hidden_activations = 4 * 32 * 4 * 64 * 4  # tokens, experts per token, hidden size, bytes
    assert usual - recomputed >= hidden_activations
    assert recomputed < usual / 3


def test_configuration_keeps_it_and_a_model_without_it_loads(tmp_path):
    model = tiny_lm(torch.float32, recompute_experts=True)
    model.save_pretrained(tmp_path)
    loaded = LstmMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.recompute_experts and loaded.model.layers[1].recompute_experts
    loaded = LstmMoeForCausalLM.from_pretrained(tmp_path, recompute_experts=False)
    assert not loaded.model.layers[1].recompute_experts
    assert not tiny_lm_config().recompute_experts
