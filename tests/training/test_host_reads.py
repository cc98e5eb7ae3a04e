"""Host reads in a step of the Trainer on a GPU; a loss that is read late still stops a run."""

import math

import pytest
import torch
from cudnn_stand_in import cudnn_on_cpu
from device_path import device_path
from host_reads_counter import counted_host_reads
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer

from moe_hf.data.windows import StreamWindows
from moe_hf.errors import NonFiniteLossError

ARGUMENTS = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0, "logging_steps": 100}


def trainer_of(folder, steps, **arguments):
    model = noiseless_lm(torch.float32, gating="noisy_top_k")
    model.set_experts_implementation("grouped_mm")
    windows = StreamWindows(ArrayStream(401), window_length=5)
    arguments = ARGUMENTS | {"max_steps": steps, "per_device_train_batch_size": 2} | arguments
    return tiny_trainer(model, windows, folder, dataloader_pin_memory=False, **arguments)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_the_trainer_reads_once(accumulation, tmp_path):
    counts = []
    for steps in (2, 4):
        with device_path(), cudnn_on_cpu():
            trainer = trainer_of(tmp_path, steps, gradient_accumulation_steps=accumulation)
            with counted_host_reads() as reads:
                trainer.train()
        counts.append(reads)
    more = {key: counts[1][key] - counts[0][key] for key in counts[1] if counts[1][key] != counts[0][key]}
    assert more == {("tolist", "training/finite_trainer.py"): 2}


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path, monkeypatch):
    with device_path(), cudnn_on_cpu():
        trainer = trainer_of(tmp_path, 4, gradient_accumulation_steps=2)
        weights = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        compute_loss = type(trainer).compute_loss
        monkeypatch.setattr(
            type(trainer), "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * math.nan
        )
        with pytest.raises(NonFiniteLossError, match="loss is nan at step 1; stopped before the update"):
            trainer.train()
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.model.named_parameters())
