"""The language model against the per-token reference, and the interface of a Transformers model."""

import naive_moe
import pytest
import torch
from tiny_models import assert_same, gradients, random_ids, tiny_lm, tiny_lm_config

from moe_hf import LstmMoeForCausalLM

VARIANTS = {
    "default": {},
    "scaled embedding": {"scale_embedding": True, "tie_word_embeddings": True},
    "one lstm": {"layer_pattern": ["lstm"]},
    "four lstms": {"layer_pattern": ["lstm"] * 4},
    "projection": {"layer_pattern": ["lstm", "moe"], "lstm_hidden_size": 12},
    "two moe layers": {"layer_pattern": ["moe", "lstm", "moe"], "num_expert_layers": 2},
    "tied": {"tie_word_embeddings": True, "gating": "softmax_top_k"},
    "strictly balanced": {"layer_pattern": ["moe", "lstm", "moe"], "gating": "strictly_balanced"},
}


def mask_of(*rows):
    return torch.tensor([[int(char) for char in row] for row in rows])


def noises_of(model, positions):
    """Seed torch; return the noise that each MoE layer will draw from it."""
    config = model.config
    torch.manual_seed(11)
    layers = config.layer_pattern.count("moe") if model.training and config.gating == "noisy_top_k" else 0
    noises = [torch.randn(positions, config.num_experts, dtype=torch.float64) for _ in range(layers)]
    torch.manual_seed(11)
    return noises


@pytest.mark.parametrize("mask", [None, mask_of("0011", "1111", "1110")], ids=["full", "padded"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_papers_with_all_gradients(variant, training, mask):
    model, input_ids = tiny_lm(**VARIANTS[variant]).train(training), random_ids(3, 4)
    weights = dict(model.named_parameters())
    labels = input_ids.clone()
    labels[1, 2] = -100
    noises = noises_of(model, input_ids.numel())
    expected = naive_moe.language_model(model.config, weights, input_ids, mask, noises, labels, training)
    output = model(input_ids, attention_mask=mask, labels=labels)

    real = torch.ones(3, 4, dtype=torch.bool) if mask is None else mask.bool()
    logits = torch.stack([expected.logits[b, s] for b, s in real.nonzero().tolist()])
    assert_same(output.logits[real], logits)
    assert_same(output.aux_loss.double(), expected.aux_loss)
    # The library computes the cross entropy in float32.
    total = expected.task_loss + expected.aux_loss if training else expected.task_loss
    assert_same(output.loss.double(), total.detach(), rtol=1e-6)

    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = {name: value for name, value in weights.items() if training or "noise_weight" not in name}
    actual = gradients((output.logits[real] * probe).sum() + output.aux_loss, inputs)
    assert_same(actual, gradients((logits * probe).sum() + expected.aux_loss, inputs))


def test_gradients_of_the_training_loss_are_the_papers():
    model, input_ids = tiny_lm().train(), random_ids(2, 5)
    weights = dict(model.named_parameters())
    expected = naive_moe.language_model(model.config, weights, input_ids, None, noises_of(model, 10), input_ids)
    actual = gradients(model(input_ids, labels=input_ids).loss, weights)
    wanted = gradients(expected.task_loss + expected.aux_loss, weights)
    for name, grad in wanted.items():
        # The library computes the cross entropy in float32.
        assert_same(actual[name], grad, rtol=0, atol=2e-6 * grad.abs().max().item())


def test_shift_labels_replace_labels():
    model, input_ids = tiny_lm(), random_ids(2, 6)
    expected = model(input_ids[:, :5], labels=input_ids[:, :5]).loss
    shift_labels = torch.cat([input_ids[:, 1:5], torch.full((2, 1), -100)], dim=1)
    assert_same(model(input_ids[:, :5], shift_labels=shift_labels).loss, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(use_reentrant):
    model, input_ids = tiny_lm(dropout=0.3, layer_pattern=["lstm", "moe", "moe", "lstm"]).train(), random_ids(3, 5)
    calls, mask = [], mask_of("00111", "11111", "11110")
    model.model.layers[1].experts.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(pick):
        model.zero_grad()
        torch.manual_seed(4)
        output = model(input_ids, attention_mask=mask, labels=input_ids)
        pick(output).backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_grads = run(lambda output: output.loss)
    _, balancing_grads = run(lambda output: output.aux_loss)
    assert len(calls) == 2
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    output, grads = run(lambda output: output.loss)
    assert len(calls) == 4
    assert_same((output.loss, output.aux_loss), (expected.loss, expected.aux_loss))
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert_same(grads, expected_grads)
    _, grads = run(lambda output: output.aux_loss)
    for index in (1, 2):
        for name in (f"model.layers.{index}.gate.weight", f"model.layers.{index}.gate.noise_weight"):
            assert grads[name].abs().max() > 0
            assert_same(grads[name], balancing_grads[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units", [None, 16])
def test_training_under_autocast_is_finite_and_close_to_float32(dtype, units):
    changes = {"std": 0.3, "lstm_hidden_size": units, "num_experts_per_tok": 5}
    input_ids, mask = random_ids(3, 5), mask_of("00111", "11111", "11110")
    losses = []
    for enabled in (False, True):
        model = tiny_lm(torch.float32, experts="grouped_mm", **changes).train()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(input_ids, attention_mask=mask, labels=input_ids)
        output.loss.backward()
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        losses.append(output.loss.item())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02


def test_a_model_in_bfloat16_runs_with_padding_and_cache():
    model, mask = tiny_lm(torch.bfloat16), mask_of("0011", "1111")
    first = model(random_ids(2, 4), attention_mask=mask, use_cache=True)
    second = model(random_ids(2, 1), past_key_values=first.past_key_values)
    assert second.logits.dtype == torch.bfloat16 and second.logits.isfinite().all()
    assert {tensor.dtype for tensor in second.past_key_values.layers[0].state} == {torch.bfloat16}


def test_router_logits_and_hidden_states_are_recorded():
    model, input_ids = tiny_lm(layer_pattern=["lstm", "moe", "lstm", "moe"]), random_ids(2, 3)
    plain = model(input_ids)
    assert plain.router_logits is None and plain.hidden_states is None and plain.aux_loss is None
    output = model(input_ids, output_router_logits=True, output_hidden_states=True)
    assert [logits.shape for logits in output.router_logits] == [(6, 5)] * 2
    assert [hidden.shape for hidden in output.hidden_states] == [(2, 3, 8)] * 5
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(input_ids))
    assert_same(model.lm_head(output.hidden_states[-1]), output.logits)
    expected = output.hidden_states[1].reshape(6, 8) @ model.model.layers[1].gate.weight.T
    assert_same(output.router_logits[0], expected)
    asked = tiny_lm(output_router_logits=True)(input_ids)
    assert len(asked.router_logits) == 1
    assert torch.equal(model(input_ids, return_dict=False)[0], plain.logits)


def test_loss_is_task_plus_balancing_in_training_and_task_alone_in_evaluation():
    model, input_ids = tiny_lm(gating="softmax_top_k"), random_ids(3, 5)
    evaluated = model(input_ids, labels=input_ids)
    trained = model.train()(input_ids, labels=input_ids)
    assert trained.aux_loss > 0
    assert_same(trained.aux_loss, evaluated.aux_loss)
    assert_same(trained.loss, evaluated.loss + evaluated.aux_loss)


def test_balancing_coefficients_weigh_the_losses():
    input_ids = random_ids(3, 5)
    losses = [
        tiny_lm(importance_loss_coef=a, load_loss_coef=b)(input_ids, labels=input_ids).aux_loss
        for a, b in [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25), (0.0, 0.0)]
    ]
    assert losses[0] > 0 and losses[1] > 0 and losses[3] == 0
    assert_same(losses[2], 0.5 * losses[0] + 0.25 * losses[1])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_micro_batches_sum_to_the_batch_and_share_the_balancing_loss(as_tensor):
    model, input_ids = tiny_lm(gating="softmax_top_k").train(), random_ids(3, 5)
    labels = input_ids.clone()
    labels[2, :4] = -100
    items = 4 + 4 + 1
    count = torch.tensor(items) if as_tensor else items
    parts = [
        model(input_ids[rows], labels=labels[rows], num_items_in_batch=count) for rows in (slice(0, 2), slice(2, 3))
    ]
    whole = model(input_ids, labels=labels)
    task = whole.loss - whole.aux_loss
    balancing = (8 * parts[0].aux_loss + 1 * parts[1].aux_loss) / items
    assert_same(parts[0].loss + parts[1].loss, task + balancing, rtol=1e-6)
    assert_same(model(input_ids, labels=labels, num_items_in_batch=count).loss, whole.loss, rtol=1e-6)


@pytest.mark.parametrize("experts", ["eager", "moe_hf", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("num_experts", [5, 64])
def test_every_parameter_gets_a_gradient(experts, num_experts):
    model = tiny_lm(torch.float32, experts=experts, num_experts=num_experts).train()
    model(random_ids(2, 4), labels=random_ids(2, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_fresh_gates_are_zero_and_fresh_models_predict_evenly():
    torch.manual_seed(0)
    model = LstmMoeForCausalLM(tiny_lm_config(vocab_size=50, hidden_size=32, initializer_range=0.02)).eval()
    gate = model.model.layers[1].gate
    assert gate.weight.abs().max() == 0 and gate.noise_weight.abs().max() == 0
    loss = model(random_ids(4, 16), labels=random_ids(4, 16)).loss
    assert abs(loss - torch.log(torch.tensor(50.0))) < 0.2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.ones(1, 2, 8)}])
def test_not_exactly_one_input_is_refused(kwargs):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_lm()(**kwargs)


@pytest.mark.parametrize("bad", [-1, 23, 100])
def test_an_id_outside_of_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match=rf"input_ids holds {bad}\b.* 22"):
        tiny_lm()(torch.tensor([[1, bad, 2]]))


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (2, 1, 4, 4)])
def test_a_mask_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(" + ", ".join(map(str, shape)) + r"\).*\(2, 4"):
        tiny_lm()(random_ids(2, 4), attention_mask=torch.ones(shape))


def test_embeddings_may_be_given_in_place_of_ids():
    model, input_ids = tiny_lm(), random_ids(2, 4)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)


def test_logits_to_keep_selects_the_last_positions():
    model, input_ids = tiny_lm(), random_ids(2, 4)
    logits = model(input_ids).logits
    assert_same(model(input_ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_same(model(input_ids, logits_to_keep=torch.tensor([0, 2])).logits, logits[:, [0, 2]])


def test_dropout_falls_on_the_embedding():
    model, input_ids = tiny_lm(dropout=0.5).train(), random_ids(4, 20)
    hidden, embedded = (
        model(input_ids, output_hidden_states=True).hidden_states[0],
        model.model.embed_tokens(input_ids),
    )
    is_zero = hidden == 0
    assert 0.4 < is_zero.double().mean() < 0.6
    assert_same(hidden[~is_zero], 2 * embedded[~is_zero])
