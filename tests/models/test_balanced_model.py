"""Models with strictly balanced gating: block, padding, generation, checkpoints, and the training of T."""

from contextlib import nullcontext

import naive_moe
import pytest
import torch
from device_path import device_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import aligned, assert_same, dense, gradients, random_ids, randomize, tiny_lm, tiny_lm_config
from transformers import AutoModelForCausalLM

from moe_hf import LstmMoeForCausalLM, LstmMoeModel, MoeBlock, StrictlyBalancedGate
from moe_hf.models.moe import layer_balancing_loss

BALANCED = {"gating": "strictly_balanced"}


def set_thresholds(module, value):
    for gate in (part for part in module.modules() if isinstance(part, StrictlyBalancedGate)):
        gate.threshold.data.fill_(value)
    return module


def block(seed=0, threshold=0.2, **changes):
    return set_thresholds(randomize(MoeBlock(tiny_lm_config(**BALANCED, **changes)), seed).double(), threshold)


def model_of(dtype=torch.float64, **changes):
    """A randomized model whose thresholds let about two of five experts pass."""
    return set_thresholds(tiny_lm(dtype, **BALANCED, **changes), 0.2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pad(input_ids, left, right):
    """`input_ids` (B, S) between columns of padding, and the mask."""
    ids = torch.nn.functional.pad(input_ids, (left, right), value=0)
    return ids, torch.nn.functional.pad(torch.ones_like(input_ids), (left, right), value=0)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=12)
@given(
    mask=st.lists(st.booleans(), min_size=8, max_size=8).filter(any),
    k=st.integers(1, 3),
    threshold=st.sampled_from([0.1, 0.2, 0.4]),
    seed=st.integers(0, 999),
)
def test_block_is_appendix_f_with_all_gradients_and_skips_padding(training, on_device, mask, k, threshold, seed):
    mask = torch.tensor(mask).view(2, 4)
    module = block(seed, threshold, num_experts_per_tok=k).train(training)
    hidden = draw(2, 4, 8, seed=seed).requires_grad_()
    with device_path() if on_device else nullcontext():
        output, importance, load, counts, threshold_loss = module(hidden, mask)
    parameters = dict(module.named_parameters())
    rows, gating = naive_moe.moe_block(list(hidden[mask]), parameters, k, training=training)
    assert_same(output[mask], torch.stack(rows))
    assert_same(importance, gating.importance)
    assert load.tolist() == counts.tolist() == gating.counts
    assert_same(threshold_loss, gating.threshold_loss)

    config = tiny_lm_config(**BALANCED, importance_loss_coef=0.7, threshold_loss_coef=0.3)
    probe = draw(int(mask.sum()), 8, seed=seed + 1)
    loss = (output[mask] * probe).sum() + layer_balancing_loss(config, importance, load, threshold_loss)
    expected = (torch.stack(rows) * probe).sum() + naive_moe.layer_loss(gating, config)
    inputs = {"hidden": hidden} | parameters
    actual = gradients(loss, inputs)
    wanted = torch.autograd.grad(expected, list(inputs.values()), allow_unused=True, materialize_grads=True)
    assert_same(actual, dict(zip(inputs, wanted)))
    assert (actual["hidden"][~mask] == 0).all()


def test_a_token_without_experts_gets_the_sigmoid_of_zero():
    module, hidden = block(threshold=1.0).eval(), draw(2, 3, 8)
    output, importance, load, _, _ = module(hidden)
    assert_same(output, hidden + 0.5)
    assert importance.tolist() == load.tolist() == [0] * 5


@pytest.mark.parametrize("implementation", ["eager", "moe_hf", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("case", ["no expert passes", "only padding", "no position"])
def test_without_any_pair_no_gradient_is_none(implementation, case):
    config = tiny_lm_config(**BALANCED)
    config._experts_implementation = implementation
    module = set_thresholds(randomize(MoeBlock(config)), 1.0).train(case != "no expert passes")
    hidden = draw(0 if case == "no position" else 2, 3, 8).float().requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool) if case == "only padding" else None
    output, importance, _, _, threshold_loss = module(hidden, mask)
    grads = gradients(output.sum() + importance.sum() + threshold_loss, dict(module.named_parameters()))
    for name, grad in grads.items():
        assert grad.isfinite().all() and ("experts" not in name or (grad == 0).all()), name


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("training", [True, False])
def test_library_implementations_agree_with_eager(implementation, training):
    def run(name):
        module = block().float().train(training)
        module.experts.config._experts_implementation = name
        hidden = draw(2, 6, 8).float().requires_grad_()
        output, importance, _, _, threshold_loss = module(hidden)
        loss = output.square().sum() + importance.square().sum() + threshold_loss
        return output, gradients(loss, {"hidden": hidden} | dict(module.named_parameters()))

    assert_same(run(implementation), run("eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", [[1.0, 1.0], [0.0, 5.0]])
def test_load_is_no_part_of_the_loss(load):
    config = tiny_lm_config(**BALANCED, importance_loss_coef=0.0, load_loss_coef=7.0, threshold_loss_coef=0.5)
    loss = layer_balancing_loss(config, torch.tensor([1.0, 3.0]), torch.tensor(load), torch.tensor(0.25))
    assert loss.item() == 0.125


@pytest.mark.parametrize("training", [True, False])
@settings(deadline=None, max_examples=10)
@given(left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(training, left, right, seed):
    model, ids = model_of(seed=seed).train(training), random_ids(2, 4, seed)
    padded, mask = pad(ids, left, right)
    expected = model(ids, labels=ids)
    actual = model(padded, attention_mask=mask, labels=padded)
    assert_same(actual.logits[:, left : left + 4], expected.logits)
    assert_same(actual.aux_loss, expected.aux_loss)
    assert_same(actual.loss, expected.loss, rtol=1e-6)


def test_in_evaluation_the_batch_size_changes_nothing_and_in_training_it_does():
    model, ids = model_of(), random_ids(4, 5)
    whole = model(ids).logits
    assert_same(torch.cat([model(row[None]).logits for row in ids]), whole)
    model.train()
    assert not torch.allclose(torch.cat([model(row[None]).logits for row in ids]), model(ids).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_does_not_depend_on_the_batch(options):
    model, prompts = model_of(), [random_ids(1, length, seed=length) for length in (2, 5, 3)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    batch = [pad(prompt, 5 - prompt.shape[1], 0) for prompt in prompts]
    ids, mask = (torch.cat(parts) for parts in zip(*batch))
    together = model.generate(ids, attention_mask=mask, **options)
    for prompt, row in zip(prompts, together):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(alone[0, -6:], row[-6:])


def test_router_logits_are_recorded_once_per_layer():
    model = model_of(layer_pattern=["lstm", "moe", "moe"])
    output = model(random_ids(2, 5), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(10, 5)] * 2


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = model_of().train(), random_ids(3, 5)

    def step():
        return gradients(model(ids, labels=ids).loss, dict(model.named_parameters()))

    plain = step()
    assert plain["model.layers.1.gate.threshold"].abs().sum() > 0
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[1].gate.register_forward_hook(lambda *args: calls.append(1))
    assert_same(step(), plain)
    assert len(calls) == 2  # so it was recomputed


def test_checkpoint_is_loaded_back_with_its_thresholds(tmp_path):
    model, ids = model_of(torch.float32), random_ids(2, 4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(loaded.model.layers[1].gate.threshold, torch.full((5,), 0.2))
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)
    base = LstmMoeModel.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(aligned(base)(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("model_class", "name"),
    [(LstmMoeForCausalLM, "model.layers.1.gate.threshold"), (LstmMoeModel, "layers.1.gate.threshold")],
)
@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax_top_k"])
def test_a_checkpoint_without_thresholds_is_refused(model_class, name, gating, tmp_path):
    tiny_lm(torch.float32, gating=gating).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} is missing.*gating='strictly_balanced'.*load_state_dict"):
        model_class.from_pretrained(tmp_path, **BALANCED)
    assert model_class.from_pretrained(tmp_path).config.gating == gating


def test_the_way_out_that_the_error_names_works():
    source, model = tiny_lm(torch.float32, gating="softmax_top_k"), LstmMoeForCausalLM(tiny_lm_config(**BALANCED))
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert result.missing_keys == ["model.layers.1.gate.threshold"] and not result.unexpected_keys
    ids = random_ids(3, 5)
    assert model.train()(ids, labels=ids).loss.isfinite()


def agreement(model, ids):
    """Returns the F1 score of the thresholds' (token, expert) pairs against the batchwise mask's pairs."""
    chosen = []
    hook = model.model.layers[1].gate.register_forward_hook(
        lambda gate, inputs, output: chosen.append(dense(output, gate.num_experts) > 0)
    )
    with torch.no_grad():
        model.train()(ids)
        model.eval()(ids)
    hook.remove()
    by_batch, by_threshold = chosen
    return (2 * (by_batch & by_threshold).sum() / (by_batch.sum() + by_threshold.sum())).item()


def counting(seed):
    """(24, 12) ids that count upwards from random starts."""
    return random_ids(24, 1, seed).add(torch.arange(12)).remainder(22) + 1


@pytest.mark.slow
def test_training_brings_the_thresholds_to_agree_with_the_batchwise_mask():
    torch.manual_seed(0)
    config = tiny_lm_config(layer_pattern=["lstm", "moe"], hidden_size=16, num_experts=8, **BALANCED)
    model, held_out, steps = LstmMoeForCausalLM(config), counting(10_000), 150
    before = agreement(model, held_out)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for step in range(steps):
        ids = counting(step)
        loss = model.train()(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    after = agreement(model, held_out)
    print(f"agreement (F1) before {before:.3f}, after {after:.3f}; loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2
    assert before < 0.8 and after > 0.9
