"""Watches the balance of the experts while a model trains, and can schedule the balancing coefficients."""

import csv
import math
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..errors import InputError
from ..models.balancing import cv_squared
from ..routing.observe import moe_layers

STATISTICS = ("importance_loss", "load_loss", "cv_importance", "cv_load", "max_over_mean_load", "dead_experts")
THRESHOLD_STATISTICS = ("threshold_loss",)  # of layers with strictly balanced gating, besides the others


class AuxLossCallback(TrainerCallback):
    """Logs, for every MoE layer, the balancing losses and how evenly its experts are used (table 6).

    Each number is the mean over the training batches since the last log of the training loss; under several
    processes, of the first process's batches:
        importance_loss, load_loss: w CV^2, as they enter the loss (w = 1 if the model's config has no coefficients);
        cv_importance, cv_load: the coefficients of variation;
        max_over_mean_load: tokens of the busiest expert over the mean, batch by batch;
        dead_experts: experts that got not one token in all of these batches;
        threshold_loss: of strictly balanced gating only, w L_batchwise per token, as it enters the loss.

    They are added to the Trainer's log as `layers.N/name`. Use `AuxLossCallback(...).attach_to(trainer)`: the callback
    then comes first, so that every reporter (TensorBoard, ...) sees the numbers; given as `callbacks=[...]`, only the
    progress bar, `log_history` and the CSV file do.

    Args:
        history_file (str | Path | None): CSV file to append to, one row for each log and layer; None for none.
        importance_loss_coef_schedule (dict[int, float] | None): {step: coefficient}, linear between the steps given
            and constant outside of them; None leaves the model's coefficient.
        load_loss_coef_schedule (dict[int, float] | None): likewise.

    Raises:
        InputError: a schedule that is not {step: coefficient} with steps and coefficients of at least 0.
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

    def attach_to(self, trainer) -> "AuxLossCallback":
        """Make this the first callback of `trainer`."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        self._forget()
        self._config = getattr(model, "config", None)
        for name, block in moe_layers(model).items():
            self._hooks.append(block.register_forward_hook(self._observer(name)))
        if self.history_file is not None and state.is_world_process_zero:
            self._cut_history(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def on_step_begin(self, args, state, control, **kwargs):
        for name, schedule in self.schedules.items():
            setattr(self._config, name, interpolate(schedule, state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        is_of_training = logs is not None and ("loss" in logs or "train_loss" in logs)
        if not is_of_training or not self._sums:  # an evaluation's log may fall between two of training
            return
        rows = []
        for layer, totals in self._sums.items():
            values = {name: (total / self._num_batches[layer]).item() for name, total in totals.items()}
            values["dead_experts"] = int((self._counts[layer] == 0).sum())
            logs.update({f"{layer}/{name}": value for name, value in values.items()})
            rows.append({"step": state.global_step, "layer": layer, **values})
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update({name: logs[name] for name in logs if "/" in name})
        if self.history_file is not None and state.is_world_process_zero:
            self._append_history(rows)
        self._forget()

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
        self.history_file.parent.mkdir(parents=True, exist_ok=True)
        with self.history_file.open("a", newline="", encoding="utf-8") as file:
            names = [
                name for name in (*STATISTICS, *THRESHOLD_STATISTICS) if name in rows[0]
            ]  # one gating, all layers
            writer = csv.DictWriter(file, ["step", "layer", *names], lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)

    def _cut_history(self, step: int) -> None:
        """Drop the rows that a killed run wrote after the checkpoint which is resumed from."""
        if self.history_file.exists():
            header, *rows = self.history_file.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= step]
            whole = self.history_file.with_suffix(".tmp")
            # A header without rows goes too: the columns depend on the gating.
            whole.write_text("".join([header, *kept] if kept else []), encoding="utf-8", newline="")
            whole.replace(self.history_file)


def interpolate(schedule: dict[int, float], step: int) -> float:
    """Value at `step` of a piecewise linear schedule {step: value}, constant before the first and after the last."""
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
            raise ValueError("a step twice, or one that is not whole")
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}_schedule={schedule!r} is not of the form {{step: coefficient}}") from error
    if not checked or min(checked) < 0 or not all(0 <= value < math.inf for value in checked.values()):
        raise InputError(f"{name}_schedule={schedule!r} needs steps and finite coefficients of at least 0")
    return checked
