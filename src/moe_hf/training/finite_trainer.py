"""Ends a training whose loss, gradient, weights or optimizer are not finite, so that every saved file is finite."""

import logging
import math
from itertools import chain

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import InputError, NonFiniteLossError
from ..models.finite import first_non_finite
from ..models.host_reads import is_on_host
from ..run_folder import list_checkpoints

logger = logging.getLogger(__name__)


class FiniteTrainerMixin:
    """A mixin: list it before `ShardedCheckpointMixin` in the bases of a Trainer.

    Loss and gradient are checked before each update; with fp16, the scaler skips an update instead. Weights and
    optimizer are checked before they are saved. An update may make a weight infinite that the next batches do not use,
    so finite losses do not prove finite weights.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._unread_losses: list[torch.Tensor] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._unread_losses.append(loss)
        if is_on_host(loss.device):
            self._stop_unless_finite()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._stop_unless_finite(grad_norm)
        return grad_norm

    def _skips_the_step(self) -> bool:
        """Return whether the scaler of fp16 skips an update whose gradient is not finite, and halves its scale.

        A scale below 1 does not help: such a run would continue without updates.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def _stop_unless_finite(self, grad_norm: torch.Tensor | float | None = None) -> None:
        """Check the losses since the last call and the gradient's norm, in one host read before the update."""
        losses, self._unread_losses = self._unread_losses, []
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        named = [("loss", loss) for loss in losses] + ([] if grad_norm is None else [("gradient norm", grad_norm)])
        if not named:
            return
        device = named[0][1].device if losses else None
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for _, value in named])
        for (name, _), value in zip(named, values.tolist()):
            if not math.isfinite(value) and not self._skips_the_step():
                raise NonFiniteLossError(
                    f"{name} is {value} at step {self.state.global_step + 1}; stopped before the update, "
                    f"{self._what_is_kept()}"
                )

    def _what_is_kept(self) -> str:
        whole = [path for path in list_checkpoints(self.args.output_dir) if (path / TRAINER_STATE_NAME).is_file()]
        return f"the last checkpoint is {whole[-1]}" if whole else f"{self.args.output_dir} has no checkpoint yet"

    def _save_checkpoint(self, model, trial):
        self._refuse_to_save_unless_finite(with_optimizer=True)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self._refuse_to_save_unless_finite(with_optimizer=False)
        super().save_model(output_dir, _internal_call)

    def _refuse_to_save_unless_finite(self, with_optimizer: bool) -> None:
        if name := self._first_non_finite(with_optimizer):
            raise NonFiniteLossError(
                f"{name} holds NaN or infinity after step {self.state.global_step}, so this step is not saved; "
                f"{self._what_is_kept()}"
            )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint and (name := self._first_non_finite(with_optimizer=True)):
            raise InputError(
                f"resume_from_checkpoint={resume_from_checkpoint}: {name} holds NaN or infinity; use an earlier one"
            )
        return prepared

    def _first_non_finite(self, with_optimizer: bool) -> str | None:
        """Return the name of a weight or optimizer tensor that is not finite, or None; the same on all processes."""
        model = self.accelerator.unwrap_model(self.model)
        name = first_non_finite(chain(model.named_parameters(), model.named_buffers()))
        if name is None and with_optimizer:
            name = first_non_finite(
                (f"the optimizer's {key} of {weight}", value)
                for weight, parameter in model.named_parameters()
                for key, value in self.optimizer.state.get(parameter, {}).items()
                if isinstance(value, torch.Tensor)
            )
        if self.saves_shards and self.args.world_size > 1:  # otherwise every process has all weights
            name = next(filter(None, gather_object([name])), None)
        return name

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        bad = [
            f"{name}={value}"
            for name, value in logs.items()  # fp16 skips a step with an infinite gradient
            if isinstance(value, float) and not math.isfinite(value) and name != "grad_norm"
        ]
        if bad:
            logger.warning(f"not finite at step {self.state.global_step}: {', '.join(bad)}")
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        if name := self.args.metric_for_best_model:
            numbers = {
                key: value for key, value in metrics.items() if key.startswith("eval_") and not isinstance(value, str)
            }
            value = numbers.get(name if name.startswith("eval_") else f"eval_{name}")
            if value is None:
                raise InputError(f"metric_for_best_model={name!r} is not one of {', '.join(sorted(numbers))}")
            if not math.isfinite(value):  # an infinite score would remain the best
                return False
        return super()._determine_best_metric(metrics, trial)
