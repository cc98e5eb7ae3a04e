"""A run that is interrupted and resumed ends with the same bits as an uninterrupted run."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import start
from tiny_training import ArrayStream, assert_same_bits, noiseless_lm, tiny_trainer
from transformers import TrainerCallback, set_seed

from moe_hf.data.windows import StreamWindows
from moe_hf.demo.text_corpus import write_demo_corpus
from moe_hf.run_folder import list_checkpoints
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.callbacks import AuxLossCallback
from moe_hf.training.checkpoints import prepare_output_dir
from moe_hf.training.lm import train_lm

STEPS_PER_EPOCH = 6
TIMEOUT = 240  # seconds


def assert_same_run(actual, expected, last_step):
    """Weights, optimizer, schedule, random and carried state at the last step, and the history of the experts."""
    actual, expected = Path(actual), Path(expected)
    assert (actual / "expert_history.csv").read_text() == (expected / "expert_history.csv").read_text()
    actual, expected = actual / f"checkpoint-{last_step}", expected / f"checkpoint-{last_step}"
    assert (actual / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    names = [path.name for path in expected.glob("*.pt")]
    assert {"optimizer.pt", "scheduler.pt"} <= set(names)
    for name in names:
        assert_same_bits(torch.load(actual / name), torch.load(expected / name), name)
    random_states = [torch.load(path / "rng_state.pth", weights_only=False)["cpu"] for path in (actual, expected)]
    assert torch.equal(*random_states)


class Interrupted(Exception):
    pass


class Interrupter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def train(folder, *, interrupt_at=None, carry_state=False, num_sampled=None, **arguments):
    """Two epochs with dropout and gating noise; goes on from the last checkpoint in `folder`."""
    set_seed(7)
    changes = dict(importance_loss_coef=0.1, load_loss_coef=0.1, num_sampled=num_sampled)
    model = noiseless_lm(torch.float32, gating="noisy_top_k", dropout=0.2, **changes)
    rows = 4 if carry_state else None
    trainer = tiny_trainer(
        model,
        StreamWindows(ArrayStream(4 * 5 * STEPS_PER_EPOCH - 1), 5, rows),
        folder,
        carry_state=carry_state,
        callbacks=[] if interrupt_at is None else [Interrupter(interrupt_at)],
        eval_dataset=StreamWindows(ArrayStream(20, seed=1), 5, 1),
        train_sampling_strategy="sequential" if carry_state else "random",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        save_strategy="steps",
        max_grad_norm=1.0,
        learning_rate=0.01,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=3,
        **({"optim": "adamw_torch"} | arguments),
    )
    AuxLossCallback(Path(folder) / "expert_history.csv").attach_to(trainer)
    checkpoint = prepare_output_dir(str(folder), "last")
    if interrupt_at is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        with pytest.raises(Interrupted):
            trainer.train(resume_from_checkpoint=checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("interrupt_at", "arguments"),
    [
        pytest.param(9, dict(save_steps=4), id="shuffled windows, within the second epoch"),
        pytest.param(
            9,
            dict(save_steps=4, carry_state=True, eval_strategy="steps", eval_steps=1),
            id="carried state, within the second epoch, evaluation at every step",
        ),
        pytest.param(7, dict(save_steps=STEPS_PER_EPOCH, carry_state=True), id="carried state, at an epoch's end"),
        pytest.param(9, dict(save_steps=4, num_sampled=8), id="sampled softmax"),
        pytest.param(7, dict(save_steps=6, eval_strategy="epoch"), id="at an epoch's end, before its evaluation"),
        pytest.param(9, dict(save_steps=4, optim="factored_adam", weight_decay=0.1), id="factored second moments"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, interrupt_at, arguments):
    train(tmp_path / "whole", **arguments)
    train(tmp_path / "resumed", interrupt_at=interrupt_at, **arguments)
    step = (interrupt_at - 1) // arguments["save_steps"] * arguments["save_steps"]
    assert train(tmp_path / "resumed", **arguments) == str(tmp_path / "resumed" / f"checkpoint-{step}")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 2 * STEPS_PER_EPOCH)


def test_half_written_checkpoint_is_passed_over(tmp_path, caplog):
    arguments = dict(save_steps=2, carry_state=True)
    train(tmp_path / "whole", **arguments)
    train(tmp_path / "resumed", interrupt_at=5, **arguments)
    (tmp_path / "resumed" / "checkpoint-4" / "trainer_state.json").unlink()
    assert train(tmp_path / "resumed", **arguments) == str(tmp_path / "resumed" / "checkpoint-2")
    assert "checkpoint-4 is incomplete: trainer_state.json is missing" in caplog.text
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 2 * STEPS_PER_EPOCH)


CONFIG = """
tokenizer_kind: word
vocab_size: 50
hidden_size: 8
dropout: 0.2
num_experts: 4
num_experts_per_tok: 2
moe_intermediate_size: 8
window_length: 5
carry_state: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
num_train_epochs: 2
max_grad_norm: 1.0
logging_steps: 5
eval_strategy: epoch
save_steps: 10
seed: 3
report_to: none
use_cpu: true
disable_tqdm: true
"""


def train_lm_of(config, *overrides):
    train_lm(*parse_arguments([str(config), *overrides]))


def kill_within_an_epoch(process, folder):
    """SIGKILL as soon as the first checkpoint is there; the epochs are much longer than that."""
    give_up = time.monotonic() + TIMEOUT
    while not (folder / "checkpoint-10" / "trainer_state.json").exists():
        assert process.is_alive(), f"the run ended with {process.exitcode} before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_run_killed_within_an_epoch_and_resumed_equals_one_never_killed(tmp_path):
    write_demo_corpus(tmp_path, num_train_lines=60, num_valid_lines=4)
    paths = {"train_files": [f"{tmp_path}/train.txt"], "validation_files": [f"{tmp_path}/valid.txt"]}
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + json.dumps(paths | {"cache_dir": f"{tmp_path}/cache"})[1:-1].replace(', "', '\n"'))

    trainer, _ = train_lm(*parse_arguments([str(config), "--output_dir", str(tmp_path / "whole")]))
    steps_per_epoch = trainer.state.max_steps // 2
    assert steps_per_epoch > 40

    folder = tmp_path / "killed"
    process = start(train_lm_of, config, "--output_dir", str(folder))
    try:
        kill_within_an_epoch(process, folder)
    finally:
        process.kill()
    killed_after = int(list_checkpoints(folder)[-1].name.removeprefix("checkpoint-"))
    assert killed_after < steps_per_epoch
    assert not (folder / "model.safetensors").exists()

    resumed = start(train_lm_of, config, "--output_dir", str(folder), "--resume_from_checkpoint")
    try:
        resumed.join(TIMEOUT)
        assert resumed.exitcode == 0
    finally:
        resumed.kill()
    assert_same_run(folder, tmp_path / "whole", trainer.state.max_steps)
    for name in ("model.safetensors", "expert_history.csv", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_resumed_makes_no_further_step(tmp_path):
    options = dict(carry_state=True, save_steps=1, max_steps=3)
    train(tmp_path, **options)
    assert train(tmp_path, **options).endswith("checkpoint-3")
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-3"
