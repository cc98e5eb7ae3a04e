"""`AuxLossCallback` reports what the experts did, and its schedules set the coefficients."""

import csv
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import ArrayStream, noiseless_lm, tiny_arguments, tiny_trainer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from moe_hf.data.windows import StreamWindows, collate_windows
from moe_hf.errors import InputError
from moe_hf.training.callbacks import STATISTICS, AuxLossCallback, interpolate

NUM_EXPERTS, STEPS, STEPS_PER_LOG = 16, 6, 3
MODEL = dict(num_experts=NUM_EXPERTS, layer_pattern=["lstm", "moe", "moe"])
MODEL |= dict(importance_loss_coef=0.3, load_loss_coef=0.2)
LAYERS = ("layers.1", "layers.2")
# Without learning, every step has the same model.
ARGUMENTS = dict(max_steps=STEPS, logging_steps=STEPS_PER_LOG, learning_rate=0.0, per_device_train_batch_size=2)


def windows():
    return StreamWindows(ArrayStream(2 * 5 * STEPS), 5)  # the last window is one token short


def trained(folder, callback, **arguments):
    trainer = tiny_trainer(noiseless_lm(**MODEL), windows(), folder, **(ARGUMENTS | arguments))
    callback.attach_to(trainer)
    trainer.train()
    return trainer


def by_hand() -> list[dict[str, float]]:
    """For each log the statistics of both layers, from the model's router logits."""
    model = noiseless_lm(**MODEL)
    seen = []
    for batch in DataLoader(windows(), batch_size=2, collate_fn=collate_windows):
        outputs = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), output_router_logits=True)
        real = (batch["shift_labels"] != -100).flatten()
        for layer, logits in zip(LAYERS, outputs.router_logits):
            values, index = logits[real].topk(2)
            counts = index.flatten().bincount(minlength=NUM_EXPERTS).double()
            importance = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
            for row, weights in zip(index, values.softmax(-1)):
                importance[row] += weights
            cv_importance, cv_load = ((x.std(correction=0) / x.mean()).item() for x in (importance, counts))
            values = (0.3 * cv_importance**2, 0.2 * cv_load**2, cv_importance, cv_load, counts.max() / counts.mean())
            seen.append((layer, [float(value) for value in values], counts))
    logs = []
    for first in range(0, STEPS, STEPS_PER_LOG):
        log = {}
        for layer in LAYERS:
            part = [(values, counts) for name, values, counts in seen if name == layer][first : first + STEPS_PER_LOG]
            for i, name in enumerate(STATISTICS[:-1]):
                log[f"{layer}/{name}"] = sum(values[i] for values, _ in part) / STEPS_PER_LOG
            log[f"{layer}/dead_experts"] = int((sum(counts for _, counts in part) == 0).sum())
            assert any(int((counts == 0).sum()) > log[f"{layer}/dead_experts"] for _, counts in part)
        logs.append(log)
    return logs


def statistics_of(trainer) -> list[dict[str, float]]:
    history = [{name: log[name] for name in log if "/" in name} for log in trainer.state.log_history if "loss" in log]
    assert len(history) == STEPS // STEPS_PER_LOG
    return history


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(logs, expected):
    assert len(logs) == len(expected)
    for log, values in zip(logs, expected):
        assert log == pytest.approx(values, rel=1e-9)


def test_numbers_are_those_of_the_models_outputs(tmp_path):
    path = tmp_path / "new folder" / "history.csv"
    expected = by_hand()
    assert_same(statistics_of(trained(tmp_path, AuxLossCallback(path))), expected)
    rows = rows_of(path)
    assert [(row["step"], row["layer"]) for row in rows] == [(s, layer) for s in ("3", "6") for layer in LAYERS]
    for row in rows:
        log = expected[int(row["step"]) // STEPS_PER_LOG - 1]
        assert {f"{row['layer']}/{name}": float(row[name]) for name in STATISTICS} == pytest.approx(
            {name: value for name, value in log.items() if name.startswith(row["layer"])}, rel=1e-9
        )


def test_accumulation_steps_are_batches_of_the_mean(tmp_path):
    arguments = dict(gradient_accumulation_steps=STEPS_PER_LOG, logging_steps=1, max_steps=STEPS // STEPS_PER_LOG)
    assert_same(statistics_of(trained(tmp_path, AuxLossCallback(), **arguments)), by_hand())


def test_gradient_checkpointing_counts_nothing_twice(tmp_path):
    trainer = trained(tmp_path, AuxLossCallback(), activation_checkpointing=True)
    assert trainer.model.model.layers[1].gradient_checkpointing
    assert_same(statistics_of(trainer), by_hand())


def test_evaluation_within_a_logging_window_neither_counts_nor_ends_it(tmp_path):
    trainer = tiny_trainer(
        noiseless_lm(**MODEL),
        windows(),
        tmp_path,
        eval_dataset=StreamWindows(ArrayStream(12), 5, 1),
        eval_strategy="steps",
        eval_steps=2,
        **ARGUMENTS,
    )
    AuxLossCallback(tmp_path / "history.csv").attach_to(trainer)
    trainer.train()
    assert_same(statistics_of(trainer), by_hand())
    assert [row["step"] for row in rows_of(tmp_path / "history.csv")] == ["3", "3", "6", "6"]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3 and not any("/" in name for log in evaluations for name in log)


def test_strictly_balanced_layers_report_their_threshold_loss_too(tmp_path):
    changes = dict(gating="strictly_balanced", num_experts=4, threshold_loss_coef=0.6)
    model, seen = noiseless_lm(**(MODEL | changes)), []
    model.model.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output[4].item()))
    trainer = tiny_trainer(model, windows(), tmp_path, **ARGUMENTS)
    path = tmp_path / "history.csv"
    path.write_text("step,layer,other columns\n3,layers.1,0\n")  # from an earlier run with another gate
    AuxLossCallback(path).attach_to(trainer)
    trainer.train()
    expected = [0.6 * sum(seen[first : first + STEPS_PER_LOG]) / STEPS_PER_LOG for first in (0, STEPS_PER_LOG)]
    logs, rows = statistics_of(trainer), rows_of(path)
    assert [log["layers.2/threshold_loss"] for log in logs] == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 0
    assert [float(row["threshold_loss"]) for row in rows if row["layer"] == "layers.2"] == pytest.approx(expected)
    for log in logs:  # every expert has the same number of tokens
        assert log["layers.1/load_loss"] == 0
        assert log["layers.1/max_over_mean_load"] == 1
    assert "layers.1/threshold_loss" not in by_hand()[0] and list(rows[0]) == [
        "step",
        "layer",
        *STATISTICS,
        "threshold_loss",
    ]


class LogRecorder(TrainerCallback):
    def __init__(self):
        self.logs, self.coefs = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.coefs.append((model.config.importance_loss_coef, model.config.load_loss_coef))


def test_every_reporter_sees_the_numbers(tmp_path):
    recorder = LogRecorder()
    trainer = trained(tmp_path, AuxLossCallback(), callbacks=[recorder], report_to="tensorboard")
    expected = statistics_of(trainer)
    assert_same([{name: log[name] for name in log if "/" in name} for log in recorder.logs[:-1]], expected)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    for name in expected[0]:
        read = [(event.step, event.value) for event in accumulator.Scalars(f"train/{name}")]
        assert read == [(3, pytest.approx(expected[0][name])), (6, pytest.approx(expected[1][name]))]


def test_plain_trainer_takes_it_as_a_callback(tmp_path):
    trainer = Trainer(
        model=noiseless_lm(**MODEL),
        args=tiny_arguments(tmp_path, **ARGUMENTS),
        train_dataset=windows(),
        data_collator=collate_windows,
        callbacks=[AuxLossCallback(tmp_path / "history.csv")],
    )
    trainer.train()
    assert_same(statistics_of(trainer), by_hand())
    assert len(rows_of(tmp_path / "history.csv")) == 4


def test_model_keeps_no_hooks_after_training(tmp_path):
    trainer = trained(tmp_path, AuxLossCallback())
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_resumed_run_does_not_repeat_rows(tmp_path):
    path = tmp_path / "history.csv"
    trained(tmp_path, AuxLossCallback(path), save_strategy="steps", save_steps=3)
    before = path.read_text()
    trainer = tiny_trainer(noiseless_lm(**MODEL), windows(), tmp_path, **ARGUMENTS)
    AuxLossCallback(path).attach_to(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert path.read_text() == before


def test_new_run_drops_the_rows_of_an_old_one(tmp_path):
    path = tmp_path / "history.csv"
    trained(tmp_path, AuxLossCallback(path))
    before = path.read_text()
    trained(tmp_path, AuxLossCallback(path))
    assert path.read_text() == before


def test_schedules_set_the_models_coefficients(tmp_path):
    recorder = LogRecorder()
    callback = AuxLossCallback(
        importance_loss_coef_schedule={"1": 0.4, "5": 0.0}, load_loss_coef_schedule={0: 0.1, 2: 0.3}
    )
    trainer = trained(tmp_path, callback, callbacks=[recorder])
    assert [pair[0] for pair in recorder.coefs] == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert [pair[1] for pair in recorder.coefs] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    logged = statistics_of(trainer)[0]
    expected = by_hand()[0]
    assert logged["layers.1/cv_importance"] == pytest.approx(expected["layers.1/cv_importance"], rel=1e-9)
    assert logged["layers.1/importance_loss"] != pytest.approx(expected["layers.1/importance_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 1.0), (10, 1.0), (15, 0.75), (20, 0.5), (60, 0.25), (100, 0.0), (101, 0.0)]
)
def test_schedule_is_linear_between_its_steps_and_constant_outside(step, value):
    assert interpolate({100: 0.0, 10: 1.0, 20: 0.5}, step) == pytest.approx(value)


@pytest.mark.parametrize("name", ["importance_loss_coef_schedule", "load_loss_coef_schedule"])
@pytest.mark.parametrize(
    "schedule", [{}, {-1: 0.1}, {0: -0.1}, {0: math.nan}, {0: math.inf}, {"a": 1}, 0.1, "0.1", [1]]
)
def test_bad_schedule_is_named(name, schedule):
    with pytest.raises(InputError) as caught:
        AuxLossCallback(**{name: schedule})
    assert f"{name}={schedule!r}" in str(caught.value)
