"""Refusals of `LmTrainer`, what the plain Trainer gets from the models, and the paper's schedule."""

import pytest
import torch
from tiny_training import ArrayStream, noiseless_lm, tiny_arguments, tiny_trainer
from torch import nn
from transformers import Trainer, TrainerCallback

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM, MoeBlock
from moe_hf.data.windows import StreamWindows
from moe_hf.errors import InputError
from moe_hf.routing.observe import routing_totals
from moe_hf.training.checkpoints import check_same_run


def windows(num_rows=4):
    return StreamWindows(ArrayStream(161), 5, num_rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(per_device_train_batch_size=2), "num_rows=2 .* not 4"),
        (dict(per_device_train_batch_size=4, train_sampling_strategy="random"), "not 'random'"),
        (dict(per_device_train_batch_size=4, auto_find_batch_size=True), "auto_find_batch_size=False .now True"),
        (dict(per_device_train_batch_size=4, label_smoothing_factor=0.1), "label_smoothing_factor=0.1"),
    ],
)
def test_rows_that_are_not_the_batches_rows_are_refused(tmp_path, arguments, message):
    arguments = {"train_sampling_strategy": "sequential", **arguments}
    with pytest.raises(InputError, match=message):
        tiny_trainer(noiseless_lm(), windows(), tmp_path, carry_state=True, **arguments)


def test_evaluation_in_batches_that_are_not_the_rows_is_refused(tmp_path):
    options = dict(carry_state=True, eval_dataset=windows(), per_device_eval_batch_size=2)
    trainer = tiny_trainer(noiseless_lm(), None, tmp_path, **options)
    with pytest.raises(InputError, match="num_rows=4, not 2"):
        trainer.evaluate()


def test_the_plain_trainer_evaluates(tmp_path):
    rows = [{"input_ids": torch.arange(1, 7), "labels": torch.arange(1, 7)}] * 4
    model = noiseless_lm(torch.float32)
    metrics = Trainer(model, tiny_arguments(tmp_path), eval_dataset=rows).evaluate()
    with torch.no_grad():
        expected = model.eval()(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_learning_rate_warms_up_and_falls_with_the_square_root(tmp_path):
    rates = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            rates.append(lr_scheduler.get_last_lr()[0])

    options = dict(learning_rate=0.1, warmup_steps=4, max_steps=17, lr_scheduler_type="inverse_sqrt")
    tiny_trainer(noiseless_lm(), windows(None), tmp_path, callbacks=[Record()], **options).train()
    expected = [0.1 * step / 4 if step < 4 else 0.1 * (4 / step) ** 0.5 for step in range(17)]
    assert rates == pytest.approx(expected)


def test_the_saved_model_uses_its_cache(tmp_path):
    trainer = tiny_trainer(noiseless_lm(torch.float32), windows(None), tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert LstmMoeConfig.from_pretrained(tmp_path / "saved").use_cache


def test_an_argument_that_differs_on_resumption_is_named(tmp_path):
    check_same_run(tmp_path, None, {"window_length": 16, "carry_state": True})
    check_same_run(tmp_path, tmp_path / "checkpoint-5", {"window_length": 16, "carry_state": True})
    with pytest.raises(InputError, match="window_length=8 differs from window_length=16 of the run"):
        check_same_run(tmp_path, tmp_path / "checkpoint-5", {"window_length": 8, "carry_state": True})


@pytest.mark.parametrize("change", [{"hidden_size": 30}, {"moe_intermediate_size": 12}])
def test_widths_that_grouped_mm_cannot_take_are_computed_and_refused_by_it(change):
    (name, value) = next(iter(change.items()))
    sizes = dict(vocab_size=20, hidden_size=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8) | change
    model = LstmMoeForCausalLM(LstmMoeConfig(**sizes)).to(torch.bfloat16)
    assert model(torch.arange(6)[None]).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"grouped_mm.*multiples of 8, but {name}={value}"):
        model.set_experts_implementation("grouped_mm")


def test_a_block_of_its_own_is_initialised_and_counted_by_its_full_name():
    config = LstmMoeConfig(hidden_size=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config._experts_implementation = "eager"
    model = nn.ModuleDict({"encoder": nn.ModuleList([MoeBlock(config)]), "decoder": nn.ModuleList([MoeBlock(config)])})
    inputs = torch.randn(2, 3, 16)
    with routing_totals(model) as totals:
        for block in model.values():
            assert block[0](inputs)[0].abs().max() < 10
    assert set(totals) == {"encoder.0", "decoder.0"}
