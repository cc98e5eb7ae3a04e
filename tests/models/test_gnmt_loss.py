"""The loss of the translation model: scored tokens, smoothing, micro-batches, and gradients in every mode."""

import naive_gnmt
import pytest
import torch
from tiny_models import (
    END,
    FEEDINGS,
    PAD,
    START,
    assert_same,
    gradients,
    padded,
    sentences,
    tiny_gnmt,
    tiny_gnmt_config,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from moe_hf import GnmtMoeForConditionalGeneration

COEFS = {"importance_loss_coef": 0.3, "load_loss_coef": 0.2}


def batch(*lengths, side="right", seed=0):
    """Sources with a mask, and labels with -100 as padding."""
    ids, mask = padded(sentences(*[length + 1 for length in lengths], seed=seed), max(lengths) + 2, side)
    labels, _ = padded(sentences(*lengths, seed=seed + 1), max(lengths) + 1, side, value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(model, inputs, smoothing=0.0):
    """Sum of the task losses, the number of scored tokens and the balancing losses, from the slow model."""
    sources = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    targets = [row[row != -100] for row in inputs["labels"]]
    starts = [torch.cat([torch.tensor([START]), target[:-1]]) for target in targets]
    output = naive_gnmt.translation_model(model.config, dict(model.named_parameters()), sources, starts)
    total = 0.0
    for logits, target in zip(output.logits, targets):
        for step, label in zip(logits, target):
            log_probs = step - torch.log(torch.exp(step).sum())
            total = total - (1 - smoothing) * log_probs[label] - smoothing * log_probs.sum() / len(step)
    return total, sum(len(target) for target in targets), output.aux_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("feeding", FEEDINGS)
def test_training_loss_is_smoothed_task_plus_balancing_with_all_gradients(feeding, side, smoothing):
    changes = {"gating": "softmax_top_k", "attention_feeding": feeding, "label_smoothing": smoothing, **COEFS}
    model, inputs = tiny_gnmt(**changes).train(), batch(3, 1, 2, side=side)
    output = model(**inputs)
    task, count, aux_loss = reference(model, inputs, smoothing)
    assert_same(output.loss.double(), task / count + aux_loss, rtol=1e-6)
    weights = dict(model.named_parameters())
    actual, expected = gradients(output.loss, weights), gradients(task / count + aux_loss, weights)
    for name, grad in expected.items():  # the balancing losses are summed in float32
        assert_same(actual[name], grad, rtol=0, atol=1e-6 * grad.abs().max().item())


def test_evaluation_loss_is_the_task_alone_without_smoothing():
    model, inputs = tiny_gnmt(gating="softmax_top_k", label_smoothing=0.2, **COEFS), batch(3, 1, 2)
    task, count, aux_loss = reference(model, inputs)
    output = model(**inputs)
    assert_same(output.loss, task.detach() / count)
    assert_same(output.aux_loss.double(), aux_loss.detach(), rtol=1e-6)
    assert output.aux_loss > 0.01


def test_loss_is_divided_by_the_tokens_of_the_whole_batch_and_balancing_weighed_by_its_share():
    model, inputs = tiny_gnmt(gating="softmax_top_k", **COEFS).train(), batch(3, 1, 2)
    task, count, aux_loss = reference(model, inputs)
    for number in (24, torch.tensor(24)):
        loss = model(**inputs, num_items_in_batch=number).loss
        assert_same(loss.double(), task / 24 + aux_loss * count / 24, rtol=1e-6)


def test_labels_are_shifted_behind_the_start_token():
    model = tiny_gnmt()
    labels = torch.tensor([[5, 6, END], [5, END, -100], [-100, -100, 7], [-100, -100, -100]])
    expected = [[START, 5, 6], [START, 5, END], [PAD, PAD, START], [PAD, PAD, PAD]]
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == expected
    source = torch.stack(sentences(4, 4, 4, 4))
    ids = torch.tensor(expected)
    given = model(input_ids=source, decoder_input_ids=ids, labels=labels)
    assert torch.equal(given.loss, model(input_ids=source, labels=labels).loss)


def test_a_batch_without_any_label_has_no_loss_and_no_nan():
    model = tiny_gnmt().train()
    output = model(input_ids=torch.stack(sentences(3, 3)), labels=torch.full((2, 4), -100))
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_training_without_a_start_token_is_refused():
    model = tiny_gnmt(decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id=None must be a token"):
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[3, 23]])}, "input_ids holds 23, allowed are 0 to vocab_size - 1 = 22"),
        ({"decoder_input_ids": torch.tensor([[-1]])}, "decoder_input_ids holds -1"),
        ({"decoder_input_ids": None}, "exactly one of decoder_input_ids and decoder_inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask has shape \(2, 2\)"),
        ({"decoder_attention_mask": torch.ones(1, 1)}, r"decoder_attention_mask has shape \(1, 1\)"),
    ],
)
def test_impossible_inputs_are_refused_by_name(inputs, message):
    valid = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": torch.tensor([[1, 5]])}
    with pytest.raises(ValueError, match=message):
        tiny_gnmt()(**(valid | inputs))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("feeding", FEEDINGS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(feeding, use_reentrant):
    model, inputs, results = tiny_gnmt(dropout=0.3, attention_feeding=feeding).train(), batch(3, 1, 2), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(4)
        output = model(**inputs)
        output.loss.backward()
        results.append((output.loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert_same(*results)


@pytest.mark.parametrize("units", [None, 16])
@pytest.mark.parametrize("feeding", FEEDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_is_finite_and_close_to_float32(dtype, feeding, units):
    changes = {"std": 0.3, "attention_feeding": feeding, "lstm_hidden_size": units, "num_experts_per_tok": 5}
    inputs, losses = batch(3, 1, 2), []
    for enabled in (False, True):
        model = tiny_gnmt(torch.float32, **changes).train()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(**inputs, use_cache=True)
        output.loss.backward()
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        state = output.past_key_values.self_attention_cache.layers[0].state
        assert {tensor.dtype for tensor in state} == {torch.float32}
        losses.append(output.loss.item())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_task_gradient_does_not_depend_on_accumulation_steps(tmp_path, smoothing):
    inputs, results = batch(3, 1, 2, 4, 1, 3, 2, 2), []
    rows = [{name: value[b] for name, value in inputs.items()} for b in range(8)]
    for size, steps in ((8, 1), (2, 4)):
        recorder = GradientRecorder()
        torch.manual_seed(0)
        config = tiny_gnmt_config(gating="softmax_top_k", importance_loss_coef=0, load_loss_coef=0)
        config.label_smoothing = smoothing
        settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "max_grad_norm": 0}
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, **settings
        )
        model = GnmtMoeForConditionalGeneration(config)
        Seq2SeqTrainer(model, arguments, train_dataset=rows, callbacks=[recorder]).train()
        results.append(recorder.gradient)
    assert max(grad.abs().max() for grad in results[0].values()) > 1e-2
    assert_same(*results, rtol=1e-4, atol=1e-7)
