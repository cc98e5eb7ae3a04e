"""Logs the balance of the experts during training, and can schedule the balancing coefficients."""

import csv
import math
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..errors import InputError
from ..models.balancing import cv_squared
from ..routing.observe import moe_layers
from ..writing import naming, write_file

STATISTICS = ("importance_loss", "load_loss", "cv_importance", "cv_load", "max_over_mean_load", "dead_experts")
THRESHOLD_STATISTICS = ("threshold_loss",)  # of layers with strictly balanced gating, besides the others


class AuxLossCallback(TrainerCallback, ExportableState):
    """Logs the balancing losses and the balance of the experts for every MoE layer (table 6).

    Each number is the mean over the training batches since the training loss was last logged. With several processes,
    only the first process's batches count:
        importance_loss, load_loss: w CV^2, as added to the loss (w = 1 if the model's config has no coefficients);
        cv_importance, cv_load: the coefficients of variation;
        max_over_mean_load: tokens of the busiest expert divided by the mean, per batch;
        dead_experts: number of experts that got no token in any of these batches;
        threshold_loss: only with strictly balanced gating, w L_batchwise per token, as added to the loss.

    The Trainer's log has the numbers as `layers.N/name`. Use `AuxLossCallback(...).attach_to(trainer)`: the callback
    then comes first, so that every reporter (TensorBoard, ...) gets the numbers. With `callbacks=[...]`, only the
    progress bar, `log_history` and the CSV file get them.

    A checkpoint keeps the sums since the last log. The file of a resumed run therefore equals the file of a run
    without interruption.

    Args:
        history_file (str | Path | None): CSV file to append to, with one row for each log and layer; None for no file.
        importance_loss_coef_schedule (dict[int, float] | None): {step: coefficient}, linear between the given steps
            and constant outside them; None keeps the model's coefficient.
        load_loss_coef_schedule (dict[int, float] | None): a schedule for the load loss, in the same format.

    Raises:
        InputError: a schedule is not {step: coefficient} with steps and coefficients of at least 0.
    """

    def __init__(self, history_file=None, importance_loss_coef_schedule=None, load_loss_coef_schedule=None):
        self.history_file = None if history_file is None else Path(history_file)
        self.schedules = {}
        for name, schedule in (
            ("importance_loss_coef", importance_loss_coef_schedule),
            ("load_loss_coef", load_loss_coef_schedule),
        ):
            if schedule is not None:
                self.schedules[name] = _checked_schedule(name, schedule)
        self._hooks = []
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._num_batches: dict[str, int] = {}
        self._logged_step = 0

    def attach_to(self, trainer) -> "AuxLossCallback":
        """Make this callback the first of `trainer`."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        self._forget()
        self._config = getattr(model, "config", None)
        layers = moe_layers(model)
        for name, block in layers.items():
            self._hooks.append(block.register_forward_hook(self._observer(name)))
        kept = state.stateful_callbacks.setdefault(type(self).__name__, {})  # missing in an old checkpoint
        if isinstance(kept, list) or not state.global_step:  # a list: the checkpoint has several such callbacks
            kept = {}
        kept = kept.get("attributes", {})
        self._logged_step = kept.get("_logged_step", state.global_step)
        self._restore_sums(kept.get("_exported_sums", {}), layers)
        if self.history_file is not None and state.is_world_process_zero:
            self._cut_history(self._logged_step)
        is_at_epoch_end = state.epoch is not None and float(state.epoch).is_integer()
        if self._sums and args.logging_strategy == IntervalStrategy.EPOCH and is_at_epoch_end:
            self._log_rows(state)  # a Trainer that resumes after an epoch's end skips its log

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def on_step_begin(self, args, state, control, **kwargs):
        for name, schedule in self.schedules.items():
            setattr(self._config, name, interpolate(schedule, state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        is_of_training = logs is not None and ("loss" in logs or "train_loss" in logs)
        if not is_of_training or not self._sums:  # an evaluation's log may come between two logs of training
            return
        logs.update(self._log_rows(state))
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update({name: logs[name] for name in logs if "/" in name})

    def state(self) -> dict:
        """Return the state that a checkpoint keeps, see Transformers' `ExportableState`."""
        sums = {
            layer: {
                "num_batches": self._num_batches[layer],
                "counts": _exported(self._counts[layer]),
                "totals": {name: _exported(total) for name, total in totals.items()},
            }
            for layer, totals in self._sums.items()
        }
        arguments = {f"{name}_schedule": schedule for name, schedule in self.schedules.items()}
        return {
            "args": {"history_file": None if self.history_file is None else str(self.history_file), **arguments},
            "attributes": {"_logged_step": self._logged_step, "_exported_sums": sums},
        }

    def _restore_sums(self, exported: dict, layers: dict[str, nn.Module]) -> None:
        for layer in (name for name in layers if name in exported):
            device = next(layers[layer].parameters()).device
            self._num_batches[layer] = exported[layer]["num_batches"]
            self._counts[layer] = _restored(exported[layer]["counts"], device)
            totals = exported[layer]["totals"].items()
            self._sums[layer] = {name: _restored(total, device) for name, total in totals}

    def _log_rows(self, state) -> dict[str, float]:
        """Write the means to the file, reset the sums, and return the means as entries of a log."""
        rows, logs = [], {}
        for layer, totals in self._sums.items():
            values = {name: (total / self._num_batches[layer]).item() for name, total in totals.items()}
            values["dead_experts"] = int((self._counts[layer] == 0).sum())
            logs.update({f"{layer}/{name}": value for name, value in values.items()})
            rows.append({"step": state.global_step, "layer": layer, **values})
        if self.history_file is not None and state.is_world_process_zero:
            self._append_history(rows)
        self._logged_step = state.global_step
        self._forget()
        return logs

    def _observer(self, layer: str):
        def observe(module, inputs, outputs):
            _, importance, load, counts, threshold_loss = outputs
            if not module.training or importance is None:
                return
            with torch.no_grad():
                cv2_importance, cv2_load = cv_squared(importance), cv_squared(load)
                values = {
                    "importance_loss": getattr(self._config, "importance_loss_coef", 1.0) * cv2_importance,
                    "load_loss": getattr(self._config, "load_loss_coef", 1.0) * cv2_load,
                    "cv_importance": cv2_importance.sqrt(),
                    "cv_load": cv2_load.sqrt(),
                    "max_over_mean_load": counts.max() / counts.mean().clamp_min(torch.finfo(counts.dtype).tiny),
                }
                if threshold_loss is not None:
                    values["threshold_loss"] = getattr(self._config, "threshold_loss_coef", 1.0) * threshold_loss
                totals = self._sums.setdefault(layer, {})
                for name, value in values.items():
                    totals[name] = totals.get(name, 0) + value
                self._counts[layer] = self._counts.get(layer, 0) + counts
                self._num_batches[layer] = self._num_batches.get(layer, 0) + 1

        return observe

    def _forget(self):
        self._sums.clear()
        self._counts.clear()
        self._num_batches.clear()

    def _remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _append_history(self, rows: list[dict]) -> None:
        with naming("history_file", self.history_file):
            self._append_rows(rows)

    def _append_rows(self, rows: list[dict]) -> None:
        self.history_file.parent.mkdir(parents=True, exist_ok=True)
        with self.history_file.open("a", newline="", encoding="utf-8") as file:
            names = [
                name for name in (*STATISTICS, *THRESHOLD_STATISTICS) if name in rows[0]
            ]  # all layers have the same gating
            writer = csv.DictWriter(file, ["step", "layer", *names], lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)

    def _cut_history(self, step: int) -> None:
        """Drop the rows that a killed run wrote after the checkpoint to resume from."""
        if self.history_file.exists():
            header, *rows = self.history_file.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= step]
            # A header without rows is dropped too, because the columns depend on the gating.
            write_file(self.history_file, "".join([header, *kept] if kept else []), "history_file")


def _exported(tensor: torch.Tensor) -> list:
    """Return a tensor as a list for JSON, without rounding."""
    return [tensor.tolist(), str(tensor.dtype).removeprefix("torch.")]


def _restored(exported: list, device: torch.device) -> torch.Tensor:
    values, dtype = exported
    return torch.tensor(values, dtype=getattr(torch, dtype), device=device)


def interpolate(schedule: dict[int, float], step: int) -> float:
    """Return the value at `step` of a piecewise linear schedule {step: value}, constant before and after its steps."""
    steps = sorted(schedule)
    if step <= steps[0]:
        return schedule[steps[0]]
    for left, right in zip(steps, steps[1:]):
        if step <= right:
            share = (step - left) / (right - left)
            return schedule[left] + share * (schedule[right] - schedule[left])
    return schedule[steps[-1]]


def _checked_schedule(name: str, schedule) -> dict[int, float]:
    try:
        checked = {int(step): float(value) for step, value in dict(schedule).items()}
        if len(checked) < len(schedule) or any(int(step) != float(step) for step in schedule):
            raise ValueError("a step is repeated, or is not a whole number")
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}_schedule={schedule!r} is not of the form {{step: coefficient}}") from error
    if not checked or min(checked) < 0 or not all(0 <= value < math.inf for value in checked.values()):
        raise InputError(f"{name}_schedule={schedule!r} needs steps and finite coefficients of at least 0")
    return checked
