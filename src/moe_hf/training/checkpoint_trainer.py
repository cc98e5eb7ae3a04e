"""A `Trainer` mixin that marks complete checkpoints, and names a checkpoint that it cannot resume from."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from ..checksums import check_checksums, write_checksums
from ..distributed.sharded_checkpoints import ShardedCheckpointMixin
from ..errors import InputError
from ..loading import WeightsError, check_keys

logger = logging.getLogger(__name__)
# Optimizer states with the same shapes as the weights.
STATES_OF_WEIGHTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@contextmanager
def reading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Turn every error into one line that names the checkpoint.

    Args:
        checkpoint: the checkpoint's folder.
        what: the part of the checkpoint that is read.

    Raises:
        InputError: the part does not fit the run, or is damaged.
    """
    try:
        yield
    except WeightsError as error:
        raise InputError(f"checkpoint {checkpoint}: {error}") from error
    except InputError:
        raise
    except (Exception, CheckpointException) as error:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"checkpoint {checkpoint}: its {what} cannot be loaded into this run: the run has other arguments, or the "
            f"checkpoint is broken ({reason})"
        ) from error


class WholeCheckpointMixin(ShardedCheckpointMixin):
    """A mixin: list it before `Trainer`, or a subclass of it, in the bases.

    A checkpoint is complete as soon as it has trainer_state.json; checksums are added after that.
    """

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # A run failed or was killed here. Its trainer_state.json would mark the new checkpoint as complete too
            # early.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_checksums(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with reading(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        try:
            with reading(best, "weights"):
                check_checksums(best)
                if not list(Path(best).glob("*.safetensors")):  # the library would only warn
                    raise InputError(f"checkpoint {best} is incomplete: model.safetensors is missing")
                super()._load_best_model()
        except InputError as error:
            raise InputError(
                f"{error}; the training is complete: `--resume_from_checkpoint last --load_best_model_at_end false` "
                "saves the model of its last step"
            ) from error

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse a checkpoint with missing or unexpected weights, about which the library only warns."""
        not_saved = [
            *getattr(self.model, "all_tied_weights_keys", ()),
            *(getattr(self.model, "_keys_to_ignore_on_save", None) or ()),
        ]
        check_keys(set(load_result.missing_keys).difference(not_saved), set(load_result.unexpected_keys))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint, "optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._check_shapes()

    def _check_shapes(self) -> None:
        """Check the shapes of optimizer states: the optimizer may write beyond a tensor of another shape."""
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                for name, state in self.optimizer.state.get(weight, {}).items():
                    if name in STATES_OF_WEIGHTS and state.shape != weight.shape:
                        raise ValueError(f"{name} of shape {tuple(state.shape)} for weights {tuple(weight.shape)}")

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(checkpoint, "loss scale"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.args.process_index == 0:
            saved, now = len(list(Path(checkpoint).glob("rng_state*.pth"))), self.args.world_size
            if saved != now:
                logger.warning(
                    f"checkpoint {checkpoint} was saved by {saved} processes, now there are {now}: dropout and gating "
                    "noise will differ from a run without an interruption"
                )
