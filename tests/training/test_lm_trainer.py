"""`LmTrainer`: carried state, evaluation over a whole stream, and the stop on NaN."""

import math

import pytest
import torch
from tiny_training import ArrayStream, assert_same_weights, losses_of, noiseless_lm, tiny_trainer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainerCallback

from moe_hf.data.windows import StreamWindows
from moe_hf.errors import NonFiniteLossError
from moe_hf.run_folder import check_checkpoint

WINDOW = 5
LEARNING_RATE = 0.5


def rows_of(stream, num_rows):
    """The stream's rows as (inputs, targets), by hand: row r has positions r * length to (r + 1) * length."""
    tokens, num_positions = torch.from_numpy(stream.tokens), len(stream) - 1
    length = math.ceil(num_positions / num_rows)
    bounds = [(r * length, min((r + 1) * length, num_positions)) for r in range(num_rows)]
    return [(tokens[a:b], tokens[a + 1 : b + 1]) for a, b in bounds]


def truncated_bptt(model, stream, num_rows, num_epochs=1, carry=True):
    """Plain SGD, row by row: every row keeps its own state, detached between windows."""
    rows = rows_of(stream, num_rows)
    losses = []
    for _ in range(num_epochs):
        caches = [None] * num_rows
        for start in range(0, len(rows[0][0]), WINDOW):
            pieces = [(inputs[start : start + WINDOW], targets[start : start + WINDOW]) for inputs, targets in rows]
            num_tokens, step_loss = sum(len(inputs) for inputs, _ in pieces), 0.0
            for row, (inputs, targets) in enumerate(pieces):
                if len(inputs) == 0:
                    continue
                outputs = model(inputs[None], past_key_values=caches[row] if carry else None, use_cache=True)
                loss = cross_entropy(outputs.logits[0].float(), targets, reduction="sum") / num_tokens
                loss.backward()
                step_loss += loss.item()
                caches[row] = outputs.past_key_values
                for layer in caches[row].layers:
                    if getattr(layer, "keys", None) is not None:
                        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= LEARNING_RATE * weight.grad
                    weight.grad = None
            losses.append(step_loss)
    return losses


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "steps", "num_epochs"),
    [
        pytest.param(4 * 15 + 1, 4, 1, 1, id="one batch"),
        pytest.param(4 * 15 + 1, 4, 2, 2, id="two accumulation steps, two epochs"),
        pytest.param(4 * 12 - 1, 4, 2, 1, id="last rows short"),
        pytest.param(4 * 6 - 2, 4, 4, 2, id="whole micro-batches empty at the end"),
    ],
)
def test_carried_state_is_truncated_back_propagation(tmp_path, num_tokens, num_rows, steps, num_epochs):
    stream, expected = ArrayStream(num_tokens), noiseless_lm().train()
    trainer = tiny_trainer(
        noiseless_lm(),
        StreamWindows(stream, WINDOW, num_rows),
        tmp_path,
        carry_state=True,
        learning_rate=LEARNING_RATE,
        num_train_epochs=num_epochs,
        per_device_train_batch_size=num_rows // steps,
        gradient_accumulation_steps=steps,
    )
    trainer.train()
    assert losses_of(trainer) == pytest.approx(truncated_bptt(expected, stream, num_rows, num_epochs), rel=1e-6)
    assert_same_weights(trainer.model, expected)


def test_without_carry_state_windows_are_independent(tmp_path):
    stream, expected = ArrayStream(41), noiseless_lm().train()
    arguments = dict(learning_rate=LEARNING_RATE, num_train_epochs=1, per_device_train_batch_size=2)
    trainer = tiny_trainer(noiseless_lm(), StreamWindows(stream, WINDOW, 2), tmp_path, **arguments)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(truncated_bptt(expected, stream, 2, carry=False), rel=1e-6)
    assert_same_weights(trainer.model, expected)


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 38), (3, 42), (3, 44)])
def test_evaluation_with_carried_state_equals_one_pass_over_every_row(tmp_path, num_rows, num_tokens):
    num_words = 17  # end-of-sentence symbols included
    stream, model = ArrayStream(num_tokens, num_words), noiseless_lm().eval()
    nll = 0.0
    with torch.no_grad():
        for inputs, targets in rows_of(stream, num_rows):
            nll += cross_entropy(model(inputs[None]).logits[0].float(), targets, reduction="sum").item()
    windows = StreamWindows(stream, WINDOW, num_rows)
    trainer = tiny_trainer(
        model, None, tmp_path, carry_state=True, eval_dataset=windows, per_device_eval_batch_size=num_rows
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nll / (num_tokens - 1), rel=1e-6)
    assert metrics["eval_perplexity_per_token"] == pytest.approx(math.exp(nll / (num_tokens - 1)), rel=1e-6)
    assert metrics["eval_perplexity_per_word"] == pytest.approx(math.exp(nll / num_words), rel=1e-6)
    assert metrics["eval_bits_per_word"] == pytest.approx(nll / num_words / math.log(2), rel=1e-6)


def test_evaluation_without_carried_state_starts_every_window_from_zero(tmp_path):
    stream, model = ArrayStream(38, 9), noiseless_lm().eval()
    tokens, nll = torch.from_numpy(stream.tokens), 0.0
    for start in range(0, 37, WINDOW):
        inputs = tokens[start : min(start + WINDOW, 37)]
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        nll += cross_entropy(model(inputs[None]).logits[0].float(), targets, reduction="sum").item()
    trainer = tiny_trainer(model, None, tmp_path, eval_dataset=StreamWindows(stream, WINDOW, 1))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll / 37, rel=1e-6)


def test_evaluation_does_not_touch_the_random_state(tmp_path):
    trainer = tiny_trainer(noiseless_lm(), None, tmp_path, eval_dataset=StreamWindows(ArrayStream(38), WINDOW, 1))
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


class Poison(TrainerCallback):
    """After step 3 a weight becomes NaN, or the gradient of one."""

    def __init__(self, what):
        self.what = what

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            weight = model.lm_head.weight
            if self.what == "loss":
                weight.data[0, 0] = math.nan
            else:
                weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(("what", "message"), [("loss", "loss is nan"), ("gradient", "gradient norm is nan")])
def test_nan_stops_training_and_keeps_the_last_checkpoint(tmp_path, what, message):
    trainer = tiny_trainer(
        noiseless_lm(),
        StreamWindows(ArrayStream(101), WINDOW),
        tmp_path,
        callbacks=[Poison(what)],
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(NonFiniteLossError, match=f"{message} at step 4; .*{tmp_path}"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    check_checkpoint(tmp_path / "checkpoint-2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(weight.isfinite().all() for weight in model.parameters())
