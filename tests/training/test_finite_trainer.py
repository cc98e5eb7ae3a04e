"""A checkpoint or model with NaN or infinity is never written; the error says what was found."""

import math

import pytest
import torch
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer
from transformers import Trainer, TrainerCallback

from moe_hf.data.windows import StreamWindows
from moe_hf.errors import InputError, NonFiniteLossError
from moe_hf.models.finite import NonFiniteWeightsError, first_non_finite
from moe_hf.run_folder import list_checkpoints

UNUSED = 22  # the last token, which the text below never has


class Text(ArrayStream):
    def __init__(self, num_tokens):
        super().__init__(num_tokens)
        self.tokens = self.tokens % UNUSED


class Spoil(TrainerCallback):
    """Makes a value infinite after the update of a step, where no loss of later batches shows it."""

    def __init__(self, step, what="weight"):
        self.step, self.what = step, what

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == self.step:
            weight = model.get_input_embeddings().weight
            tensor = weight.data if self.what == "weight" else optimizer.state[weight]["exp_avg_sq"]
            tensor[UNUSED] = math.inf


def trainer_of(folder, *callbacks, **arguments):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=0.01)
    windows, held_out = StreamWindows(Text(4 * 5 * 6), 5), StreamWindows(Text(20), 5, 1)
    model = noiseless_lm(torch.float32, tie_word_embeddings=False)
    return tiny_trainer(
        model, windows, folder, callbacks=list(callbacks), eval_dataset=held_out, **(options | arguments)
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "factored_adam", "sgd"])
def test_no_checkpoint_holds_weights_that_are_not_finite(optim, tmp_path):
    with pytest.raises(NonFiniteLossError) as caught:
        trainer_of(tmp_path, Spoil(3), optim=optim).train()
    assert str(caught.value) == (
        "model.embed_tokens.weight holds NaN or infinity after step 4, so this step is not saved; "
        f"the last checkpoint is {tmp_path / 'checkpoint-2'}"
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_no_checkpoint_holds_an_optimizer_that_is_not_finite(tmp_path):
    with pytest.raises(NonFiniteLossError, match="the optimizer's exp_avg_sq of model.embed_tokens.weight"):
        trainer_of(tmp_path, Spoil(1, "state")).train()
    assert not list_checkpoints(tmp_path)


def test_says_that_there_is_no_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match=f"{tmp_path} has no checkpoint yet"):
        trainer_of(tmp_path, Spoil(1)).train()


def test_the_model_of_the_end_is_not_saved(tmp_path):
    trainer = trainer_of(tmp_path, Spoil(6), save_strategy="no")
    trainer.train()
    with pytest.raises(NonFiniteLossError, match="after step 6"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, Spoil(3))
    monkeypatch.setattr(type(trainer), "_refuse_to_save_unless_finite", lambda *args, **kwargs: None)
    monkeypatch.setattr("moe_hf.models.pretrained_moe.first_non_finite", lambda tensors: None)
    trainer.train()
    with pytest.raises(InputError, match="checkpoint-4: model.embed_tokens.weight holds NaN or infinity"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_librarys_trainer_writes_no_such_model_either(tmp_path):
    ours = trainer_of(tmp_path)
    options = dict(args=ours.args, train_dataset=ours.train_dataset, data_collator=ours.data_collator)
    with pytest.raises(NonFiniteWeightsError, match="embed_tokens.weight holds NaN or infinity; the model is not"):
        Trainer(model=ours.model, callbacks=[Spoil(3)], **options).train()
    assert not list((tmp_path / "checkpoint-4").glob("*"))
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


class Overflow(TrainerCallback):
    """Makes loss or gradient infinite at a step, as float16 does, and keeps the weights of every step."""

    def __init__(self, model, steps, what):
        self.step, self.weights, embedding = 0, [], model.get_input_embeddings().weight
        if what == "loss":
            model.register_forward_hook(lambda model, inputs, output: self.spoil(output, steps))
        else:
            embedding.register_hook(lambda gradient: gradient * math.inf if self.step in steps else gradient)

    def spoil(self, output, steps):
        output.loss = output.loss * math.inf if self.step in steps else output.loss
        return output

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step + 1
        self.weights.append(model.get_input_embeddings().weight.detach().clone())


def fp16_trainer(folder, what, steps, scale=2.0**10, **arguments):
    """A trainer with torch's real scaler; the numbers are float32, as on every CPU."""
    trainer = trainer_of(folder, **arguments)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.add_callback(overflow := Overflow(trainer.model, steps, what))
    return trainer, overflow


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_fp16_leaves_out_the_steps_that_overflow(what, max_grad_norm, tmp_path):
    trainer, seen = fp16_trainer(tmp_path, what, [2, 4], max_grad_norm=max_grad_norm)
    trainer.train()
    changed = [not torch.equal(*pair) for pair in zip(seen.weights, seen.weights[1:])]
    assert changed == [True, False, True, False, True]
    assert trainer.state.global_step == 6 and trainer.accelerator.scaler.get_scale() == 2.0**8
    assert (tmp_path / "checkpoint-6" / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_fp16_ends_where_no_scale_helps(what, tmp_path):
    trainer, _ = fp16_trainer(tmp_path, what, range(9), scale=2.0, max_grad_norm=0.5)
    with pytest.raises(
        NonFiniteLossError, match=f"{'loss' if what == 'loss' else 'gradient norm'} is (inf|nan) at step 3"
    ):
        trainer.train()


def test_an_evaluation_that_is_not_finite_is_told_and_never_the_best(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    values = {"perplexity_per_token": math.inf, "loss": -math.inf}  # the smallest loss of all
    monkeypatch.setattr("moe_hf.training.lm_trainer.perplexities", lambda *args: values)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "not finite at step 2: eval_perplexity_per_token=inf, eval_loss=-inf" in caplog.messages


def test_a_metric_that_is_not_there_is_named(tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="bleu")
    with pytest.raises(InputError, match="metric_for_best_model='bleu' is not one of eval_bits_per_word, "):
        trainer_of(tmp_path, **options).train()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_tensor_is_named(value, dtype):
    good, bad = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype), torch.zeros(5, dtype=dtype)
    bad[3] = value
    integers, empty, meta = torch.arange(3), torch.zeros(0), torch.zeros(2, device="meta")
    assert first_non_finite([("a", good), ("b", integers), ("c", empty), ("d", meta)]) is None
    assert first_non_finite([("a", good), ("b", bad), ("c", bad)]) == "b"
