"""The part that both families' Trainers share: the factored optimizer, and the exact end of a resumed run."""

import copy
import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..distributed.global_batch import GlobalBatchCallback
from ..errors import InputError
from ..model_code import add_code
from ..models.host_reads import is_on_host
from ..run_folder import is_checkpoint_name
from ..writing import naming, whole_files
from .checkpoint_trainer import WholeCheckpointMixin
from .factored_trainer import FactoredGradientsMixin
from .finite_trainer import FiniteTrainerMixin
from .optimizer import FACTORED_ADAM, create_factored_adam

GO_ON = "; free some space, then resume by the same command with --resume_from_checkpoint"


class SeedPerRankCallback(TrainerCallback):
    """Gives each rank its own seed, so that dropout and gating noise differ between ranks.

    The seed changes when training starts. Before that, it determines the order of the data, which all ranks share.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.manual_seed(args.seed + args.process_index)


class MoeTrainerMixin(FiniteTrainerMixin, FactoredGradientsMixin, WholeCheckpointMixin):
    """A mixin: list it before `Trainer`, or a subclass of it, in the bases; `args` are `MoeTrainingArguments`."""

    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model=model, args=copy.copy(args), **kwargs)  # the caller's arguments do not change
        if is_on_host(self.args.device):  # a CPU does not need pinned memory, and torch would warn
            self.args.dataloader_pin_memory = False
        else:
            self.args.logging_nan_inf_filter = False  # saves two host reads; an infinite loss ends the training anyway
        if self.args.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} would replace the model's loss, and "
                "with it the balancing losses; only 0 is allowed, use the model's label_smoothing instead"
            )
        self.add_callback(SeedPerRankCallback())
        if self.args.balance_across_processes and self.args.world_size > 1:
            self.add_callback(GlobalBatchCallback())

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.optim == FACTORED_ADAM:
            model = self.model if model is None else model
            self.optimizer = create_factored_adam(model, self.args, self.get_decay_parameter_names(model))
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None
        if self.args.should_save and not is_checkpoint:  # also before an upload, which calls this with neither
            self._add_code(Path(output_dir or self.args.output_dir))

    def _add_code(self, folder: Path) -> None:
        with whole_files(folder, "output_dir", GO_ON) as inside:
            if (folder / "config.json").is_file():
                shutil.copy(folder / "config.json", inside)
            add_code(inside)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if is_checkpoint_name(folder.name):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            with whole_files(folder, "output_dir", GO_ON) as inside:
                super()._save(str(inside), state_dict)
        else:
            with naming("output_dir", folder, advice=GO_ON):
                super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), name)
        was_there = folder.exists()
        try:
            with naming("output_dir", self.args.output_dir, name, GO_ON):
                super()._save_checkpoint(model, trial)
        except InputError:
            if self.args.should_save and not was_there:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _run_epoch(self, *args, **kwargs):
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed after its last step: the Trainer would make one more
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)
