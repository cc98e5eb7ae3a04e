"""Ctrl-C ends a training with a checkpoint from which the same command resumes."""

import signal
import threading

import pytest
from processes import on_processes
from tiny_runs import write_config
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer
from transformers import TrainerCallback

from moe_hf import cli
from moe_hf.commands import run_command
from moe_hf.data.windows import StreamWindows
from moe_hf.errors import InterruptedRun
from moe_hf.run_folder import list_checkpoints
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.interrupt import InterruptCallback
from moe_hf.training.lm import train_lm
from moe_hf.training.lm_trainer import LmTrainer


class Signals(TrainerCallback):
    """Sends a signal to this process during a step, or in the evaluation that follows it."""

    def __init__(self, number, step, during="step", times=1, rank=0):
        self.number, self.step, self.during, self.times, self.rank = number, step, during, times, rank

    def _send(self, where, args, state):
        if where == self.during and state.global_step == self.step and args.process_index == self.rank:
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._send("step", args, state)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._send("evaluation", args, state)


def trainer_of(folder, *callbacks, **arguments):
    windows, held_out = StreamWindows(ArrayStream(4 * 5 * 6), 5), StreamWindows(ArrayStream(20), 5, 1)
    callbacks = [InterruptCallback(), *callbacks]
    return tiny_trainer(noiseless_lm(), windows, folder, callbacks=callbacks, eval_dataset=held_out, **arguments)


@pytest.fixture(autouse=True)
def handlers():
    """Every test leaves them as they were. SIGINT is Python's, even where a shell's background job ignores it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, inherited)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "strategy", [dict(save_strategy="no"), dict(save_strategy="steps", save_steps=2, save_total_limit=1)]
)
def test_saves_after_the_step(number, strategy, tmp_path, caplog):
    trainer = trainer_of(tmp_path, Signals(number, 4, "step"), max_steps=8, **strategy)
    with pytest.raises(InterruptedRun, match="after step 5 of 8") as interruption:
        trainer.train()
    assert interruption.value.signal_number == number
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-5"
    assert f"{number.name}: stops after this step, again: at once" in caplog.messages


@pytest.mark.parametrize("save_strategy", ["no", "best"])
def test_saves_after_the_evaluation(save_strategy, tmp_path):
    best = dict(metric_for_best_model="loss", greater_is_better=True) if save_strategy == "best" else {}
    trainer = trainer_of(
        tmp_path,
        Signals(signal.SIGINT, 4, "evaluation"),
        max_steps=8,
        save_strategy=save_strategy,
        eval_strategy="steps",
        eval_steps=2,
        **best,
    )
    with pytest.raises(InterruptedRun):
        trainer.train()
    # The Trainer decides after the evaluation whether to save the best model; otherwise the next step is saved.
    assert list_checkpoints(tmp_path)[-1].name in ("checkpoint-4", "checkpoint-5")
    assert any("eval_loss" in log and log["step"] == 4 for log in trainer.state.log_history)


def test_a_second_signal_stops_at_once(tmp_path):
    trainer = trainer_of(tmp_path, Signals(signal.SIGINT, 4, "step", times=2), max_steps=8)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, InterruptCallback))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list_checkpoints(tmp_path)
    callback.restore()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, Signals(signal.SIGINT, 7, "step"), max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8 and not list_checkpoints(tmp_path)


def test_a_training_that_fails_leaves_signals_as_they_were(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setattr(LmTrainer, "training_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_lm(*parse_arguments([str(tmp_path / "config.yaml")]))  # and then the fixture looks


def test_trains_outside_of_the_main_thread(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


def interrupt_after_step_2(patch):
    run = InterruptCallback.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        run(self, args, state, control, **kwargs)

    patch.setattr(InterruptCallback, "on_step_end", interrupted)


def test_the_command_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    write_config(tmp_path)
    command = ["train-lm", str(tmp_path / "config.yaml"), "--logging_steps", "1"]

    def call(*options):
        return cli.main([*command, *options])

    assert call("--output_dir", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after_step_2(patch)
        assert call() == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert "SIGINT: stops after this step, again: at once\n" in error
    assert "interrupted after step 2 of 4" in error and "same command with --resume_from_checkpoint" in error
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert call("--resume_from_checkpoint") == 0
    for name in ("model.safetensors", "expert_history.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_of_weights_alone_promises_no_resumption(tmp_path, monkeypatch, capsys):
    write_config(tmp_path)
    interrupt_after_step_2(monkeypatch)
    assert cli.main(["train-lm", str(tmp_path / "config.yaml"), "--save_only_model", "true"]) == 128 + signal.SIGINT
    assert "no optimizer state (save_only_model), so the run cannot be resumed" in capsys.readouterr().err


def test_a_command_without_a_training_ends_too(capsys):
    def command():
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert capsys.readouterr().err == "interrupted\n"


def train_as_one_of_two(folder):
    signals = Signals(signal.SIGINT, 2, "step", times=3, rank=1)  # the terminal's and the launcher's
    trainer = trainer_of(folder, signals, max_steps=6, per_device_train_batch_size=2)
    with pytest.raises(InterruptedRun, match="after step 3 of 6"):
        trainer.train()
    return trainer.state.global_step


@pytest.mark.distributed
def test_all_processes_stop_after_the_same_step(tmp_path):
    assert on_processes(2, train_as_one_of_two, tmp_path) == [3, 3]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
