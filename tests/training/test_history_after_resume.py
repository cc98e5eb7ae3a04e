"""The history of the experts is the same for a run that was killed anywhere and resumed."""

import json

import pytest
import torch
from bad_inputs import Place
from processes import on_processes
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer
from transformers import Trainer, TrainerCallback, set_seed

from moe_hf import cli
from moe_hf.data.windows import StreamWindows
from moe_hf.run_folder import HISTORY_FILE
from moe_hf.training.callbacks import AuxLossCallback
from moe_hf.training.checkpoints import prepare_output_dir

STEPS = 7
HIERARCHICAL = dict(num_expert_groups=2, num_groups_per_tok=2, num_experts=8, num_experts_per_tok=4)


class Killed(BaseException):
    pass


class Killer(TrainerCallback):
    """Raises at a step, before its log and checkpoint or after its checkpoint."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def _raise(self, event, state):
        if (state.global_step, event) == (self.step, self.event):
            raise Killed

    def on_step_end(self, args, state, control, **kwargs):
        self._raise("step", state)

    def on_log(self, args, state, control, **kwargs):
        self._raise("log", state)

    def on_save(self, args, state, control, **kwargs):
        self._raise("save", state)


def train(folder, killer=None, dtype=torch.float32, trainer_class=None, model=None, **arguments) -> bytes | None:
    """Resumes a run from its last checkpoint; returns the history at the end, or None if the run was killed."""
    set_seed(3)
    changes = dict(gating="noisy_top_k", layer_pattern=["lstm", "moe", "moe"], importance_loss_coef=0.1)
    model = noiseless_lm(dtype, **(changes | dict(load_loss_coef=0.1, dropout=0.1) | (model or {})))
    values = dict(max_steps=STEPS, per_device_train_batch_size=2, save_strategy="steps", save_steps=2)
    windows = StreamWindows(ArrayStream(2 * 5 * 4 - 1), 5)
    trainer = tiny_trainer(model, windows, folder, **(values | dict(logging_steps=3, learning_rate=0.01) | arguments))
    if trainer_class is not None:
        collator = trainer.data_collator
        trainer = trainer_class(model=model, args=trainer.args, train_dataset=windows, data_collator=collator)
    AuxLossCallback(folder / HISTORY_FILE, {0: 0.1, 6: 0.3}).attach_to(trainer)
    trainer.add_callback(killer or Killer(None, None))
    trainer.accelerator.wait_for_everyone()  # the first process writes, and the others read
    try:
        trainer.train(resume_from_checkpoint=prepare_output_dir(str(folder), "last"))
    except Killed:
        return None
    trainer.accelerator.wait_for_everyone()
    return (folder / HISTORY_FILE).read_bytes()


def assert_killing_changes_nothing(folder, events=("step",), steps=(4, STEPS), **arguments):
    whole = train(folder / "whole", **arguments)
    assert whole.count(b"\n") > 4
    for event in events:
        for step in steps:
            train(folder / f"{event}-{step}", Killer(step, event), **arguments)
            assert train(folder / f"{event}-{step}", **arguments) == whole, (event, step)


def test_at_every_step_before_and_after_its_checkpoint(tmp_path):
    assert_killing_changes_nothing(tmp_path, events=("step", "log", "save"), steps=range(3, STEPS + 1))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(dict(logging_steps=5, save_steps=3), id="steps"),
        pytest.param(dict(logging_strategy="epoch", save_steps=1), id="epochs"),
        pytest.param(dict(gradient_accumulation_steps=2, save_steps=1, logging_first_step=True), id="accumulation"),
        pytest.param(dict(dtype=torch.float64), id="float64"),
        pytest.param(dict(dtype=torch.bfloat16), id="bfloat16"),
        pytest.param(dict(trainer_class=Trainer), id="the library's own Trainer"),
        pytest.param(dict(model=dict(gating="strictly_balanced")), id="strictly balanced"),
        pytest.param(dict(model=HIERARCHICAL), id="hierarchical"),
    ],
)
def test_with_other_arguments(arguments, tmp_path):
    if "dtype" in arguments:
        arguments = arguments | {"model": {"gating": "softmax_top_k"}}
    assert_killing_changes_nothing(tmp_path, **arguments)


def test_a_killed_translation_run(tmp_path, monkeypatch):
    config = Place(tmp_path).translation_config(
        with_text=True, max_steps=5, logging_steps=5, save_strategy="steps", save_steps=2
    )

    def call(*options):
        return cli.main(["train-translation", str(config), *options])

    assert call("--output_dir", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("moe_hf.training.runs.OptimizerSizeCallback", lambda: Killer(3, "step"))
        with pytest.raises(Killed):
            call()
    assert call("--resume_from_checkpoint") == 0
    histories = [(tmp_path / name / HISTORY_FILE).read_bytes() for name in ("run", "whole")]
    assert histories[0] == histories[1] and histories[0].count(b"\n") > 2


def test_a_checkpoint_of_before_is_resumed(tmp_path):
    whole = train(tmp_path)
    (tmp_path / "checkpoint-6").rename(tmp_path / "left out")
    (tmp_path / "checkpoint-7").rename(tmp_path / "left out too")
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("AuxLossCallback")
    path.write_text(json.dumps(state))
    assert train(tmp_path).count(b"\n") == whole.count(b"\n")


def test_a_new_run_of_the_same_trainer_starts_anew(tmp_path):
    callback, killer = AuxLossCallback(tmp_path / HISTORY_FILE), Killer(3, "step")
    windows = StreamWindows(ArrayStream(2 * 5 * 4), 5)
    options = dict(max_steps=4, learning_rate=0.0, per_device_train_batch_size=2, logging_steps=2)
    trainer = tiny_trainer(noiseless_lm(), windows, tmp_path, callbacks=[killer], **options)
    callback.attach_to(trainer)
    with pytest.raises(Killed):
        trainer.train()
    killer.step = None
    trainer.train()
    first = (tmp_path / HISTORY_FILE).read_bytes()
    trainer.train()
    assert (tmp_path / HISTORY_FILE).read_bytes() == first


@pytest.mark.distributed
def test_of_two_processes_the_first_ones_is_kept(tmp_path):
    on_processes(2, assert_killing_changes_nothing, tmp_path)
