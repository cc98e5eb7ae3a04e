"""How an evaluation changes the noise of later steps with the plain Trainer, and how to avoid this."""

import pytest
import torch
from tiny_models import tiny_gnmt, tiny_lm
from tiny_training import losses_of
from transformers import Trainer, TrainingArguments, default_data_collator

from moe_hf.training.same_noise import SameNoiseCallback

MODELS = {"lstm_moe": tiny_lm, "gnmt_moe": tiny_gnmt}
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 23, (12, 6), generator=GENERATOR)]
EVERY_OTHER_STEP = {"eval_strategy": "steps", "eval_steps": 2}


def losses(family, folder, callbacks=(), gating="noisy_top_k", **arguments) -> list[float]:
    model = MODELS[family](torch.float64, gating=gating).train()
    values = dict(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    values |= dict(num_train_epochs=2, per_device_train_batch_size=2, logging_steps=1, seed=1)
    trainer = Trainer(
        model,
        TrainingArguments(**(values | arguments)),
        data_collator=default_data_collator,
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=list(callbacks),
    )
    trainer.train()
    assert len(losses_of(trainer)) == 12
    return losses_of(trainer)


@pytest.fixture(scope="module", params=MODELS)
def undisturbed(request, tmp_path_factory):
    return request.param, losses(request.param, tmp_path_factory.mktemp("undisturbed"))


def test_an_evaluation_changes_the_noise_of_later_steps(undisturbed, tmp_path):
    family, expected = undisturbed
    for arguments in (EVERY_OTHER_STEP, EVERY_OTHER_STEP | {"data_seed": 1}):  # data_seed only orders the data
        actual = losses(family, tmp_path, **arguments)
        assert actual[:2] == expected[:2] and actual[2:] != expected[2:]


def test_without_noise_an_evaluation_changes_nothing(undisturbed, tmp_path):
    family, _ = undisturbed
    quiet = losses(family, tmp_path / "quiet", gating="softmax_top_k")
    assert losses(family, tmp_path, gating="softmax_top_k", **EVERY_OTHER_STEP) == quiet


@pytest.mark.parametrize(
    "arguments",
    [EVERY_OTHER_STEP, {"eval_strategy": "epoch"}, EVERY_OTHER_STEP | {"eval_on_start": True}],
    ids=["steps", "epochs", "at the start"],
)
def test_the_callback_gives_every_step_its_noise(undisturbed, arguments, tmp_path):
    family, expected = undisturbed
    assert losses(family, tmp_path, [SameNoiseCallback()], **arguments) == expected


def test_an_evaluation_outside_of_a_training_is_left_alone(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    model, data = MODELS["lstm_moe"](torch.float64), {"data_collator": default_data_collator, "eval_dataset": ROWS[:4]}
    losses_with_and_without = []
    for callbacks in ([SameNoiseCallback()], []):
        torch.manual_seed(0)
        trainer = Trainer(model, arguments, callbacks=callbacks, **data)
        losses_with_and_without.append((trainer.evaluate()["eval_loss"], torch.get_rng_state().tolist()))
    assert losses_with_and_without[0] == losses_with_and_without[1]
