"""The gradient does not depend on how accumulation steps and processes divide a batch.

Here each process balances its own batch; test_data_parallel.py tests the global batch.

Shape suffixes: T tokens, E experts.
"""

import pytest
import torch
from processes import on_processes
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from moe_hf.data.windows import StreamWindows, collate_windows

# On equal windows, and on windows of 1 to 7 tokens, so that micro-batches differ in their number of scored tokens.
DATA = ("equal", "unequal")
COEFS = {"importance_loss_coef": 0.3, "load_loss_coef": 0.2}


def windows_of(data: str) -> list[dict[str, torch.Tensor]]:
    """The 32 windows of one global batch."""
    windows = list(StreamWindows(ArrayStream(32 * 7 + 1), 7))
    if data == "unequal":
        lengths = [1 + (i * i + i // 8) % 7 for i in range(32)]
        windows = [{k: v[:length] for k, v in window.items()} for window, length in zip(windows, lengths)]
    return windows


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def trained_gradient(folder, data, batch_size, steps, **config):
    recorder = GradientRecorder()
    tiny_trainer(
        noiseless_lm(**config),
        windows_of(data),
        folder,
        callbacks=[recorder],
        max_steps=1,
        per_device_train_batch_size=batch_size,
        balance_across_processes=False,
        gradient_accumulation_steps=steps,
    ).train()
    return recorder.gradient


def task_gradient(data) -> dict[str, torch.Tensor]:
    """Of the mean cross-entropy over all scored tokens of the 32 windows."""
    model = noiseless_lm()
    batch = collate_windows(windows_of(data))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    cross_entropy(logits.flatten(0, 1).float(), batch["shift_labels"].flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def balancing_gradient(data, micro_batch_size) -> dict[str, torch.Tensor]:
    """Mean over the micro-batches, weighted by scored tokens, of the gradient of w CV(importance)^2 of each.

    With softmax gating the load does not have a gradient.
    """
    windows = windows_of(data)
    total = sum(len(window["input_ids"]) for window in windows)
    gradient = {}
    for start in range(0, 32, micro_batch_size):
        batch = collate_windows(windows[start : start + micro_batch_size])
        model = noiseless_lm()
        real_T = (batch["shift_labels"] != -100).flatten()
        outputs = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), output_router_logits=True)
        logits_TE = outputs.router_logits[0][real_T]
        values, index = logits_TE.topk(2)
        importance_E = torch.zeros_like(logits_TE).scatter(1, index, values.softmax(-1)).sum(0)
        loss = COEFS["importance_loss_coef"] * importance_E.var(correction=0) / importance_E.mean() ** 2
        (loss * real_T.sum() / total).backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                gradient[name] = gradient.get(name, 0) + weight.grad
    return gradient


def assert_same_gradient(actual, *parts):
    for name, gradient in actual.items():
        expected = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("batch_size", "steps"), [(32, 1), (8, 4)])
def test_task_gradient_does_not_depend_on_accumulation_steps(tmp_path, data, batch_size, steps):
    assert_same_gradient(trained_gradient(tmp_path, data, batch_size, steps), task_gradient(data))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("batch_size", "steps"), [(32, 1), (8, 4)])
def test_balancing_gradient_is_the_mean_over_micro_batches(tmp_path, data, batch_size, steps):
    gradient = trained_gradient(tmp_path, data, batch_size, steps, **COEFS)
    balancing = balancing_gradient(data, batch_size)
    assert balancing["model.layers.1.gate.weight"].abs().max() > 1e-3
    assert_same_gradient(gradient, task_gradient(data), balancing)


# (data, micro-batch, steps, coefficients); two processes
CASES = [("equal", 16, 1, {}), ("unequal", 16, 1, {}), ("unequal", 16, 1, COEFS), ("unequal", 8, 2, COEFS)]


def train_all_cases(folder: str) -> list[dict]:
    """Runs in each of the two processes."""
    gradients = [trained_gradient(folder, data, size, steps, **coefs) for data, size, steps, coefs in CASES]
    assert torch.distributed.get_world_size() == 2
    return gradients


@pytest.fixture(scope="module")
def gradients_of_two_processes(tmp_path_factory):
    """For each process, its gradients of all `CASES`."""
    return on_processes(2, train_all_cases, str(tmp_path_factory.mktemp("processes")))


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_gradient_does_not_depend_on_the_number_of_processes(gradients_of_two_processes, case):
    data, micro_batch_size, _, coefs = CASES[case]
    parts = [task_gradient(data)] + ([balancing_gradient(data, micro_batch_size)] if coefs else [])
    for gradients in gradients_of_two_processes:
        assert_same_gradient(gradients[case], *parts)
