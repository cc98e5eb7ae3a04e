"""Sharded checkpoints: every process writes and reads its own part, and any number of processes can resume.

A sharded `checkpoint-N` has shard-*.safetensors instead of model.safetensors, and a folder `optimizer` instead of
optimizer.pt. torch.distributed.checkpoint writes both, and `from_pretrained` can read the shards. At the end of a run,
`save_model` still writes one complete model, to which every process writes its part.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    _redistribute_state_dict,
    is_sharded_checkpoint,
    save_optimizer_distributed,
)

from ..errors import InputError, first_line
from .safe_checkpoint_reader import SafePlanner, SafeReader
from .sharded_writing import write_weights

OPTIMIZER_FOLDER = "optimizer"


def check_sharded_optimizer(checkpoint: str | Path) -> None:
    """Check that every file of a sharded checkpoint's optimizer is present and complete.

    Raises:
        InputError: a file is missing or truncated, or would execute code; the message names the file.
    """
    folder = Path(checkpoint) / OPTIMIZER_FOLDER
    try:
        parts = list(SafeReader(folder).read_metadata().storage_data.values())
        ends = [(folder / part.relative_path, part.offset + part.length) for part in parts]
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {checkpoint} is incomplete: {OPTIMIZER_FOLDER}/.metadata is missing") from error
    except Exception as error:  # a damaged pickle raises many kinds of errors
        raise InputError(
            f"checkpoint {checkpoint} is broken: {OPTIMIZER_FOLDER}/.metadata cannot be read ({first_line(error)})"
        ) from error
    for file, end in ends:
        if not file.is_file() or file.stat().st_size < end:
            raise InputError(
                f"checkpoint {checkpoint} is incomplete: {OPTIMIZER_FOLDER}/{file.name} is missing or cut"
            )


def _check_no_more_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Refuse weights that the model does not have: the library checks for missing weights, but ignores extra ones."""
    saved = HuggingFaceStorageReader(checkpoint).read_metadata().state_dict_metadata
    if more := sorted(saved.keys() - get_model_state_dict(model).keys()):
        raise InputError(f"checkpoint {checkpoint} has weights that this run's model lacks: {', '.join(more[:3])}")


def load_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load an optimizer as the library's `load_optimizer_distributed` does, without executing code in the folder."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    own = get_optimizer_state_dict(model, optimizer, options=options)
    state = _redistribute_state_dict(own)
    dcp.load({"optimizer": state}, storage_reader=SafeReader(folder), planner=SafePlanner())
    state = _redistribute_state_dict(state, reference_state_dict=own)
    set_optimizer_state_dict(model, optimizer, state)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write each process's part of the weights as a safetensors file. All processes must call this function."""
    state = _redistribute_state_dict(get_model_state_dict(model))
    for name in model.all_tied_weights_keys:  # the file format does not allow two names for the same memory
        state[name] = state[name].clone()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


class ShardedCheckpointMixin:
    """A mixin: list it before `Trainer`, or a subclass of it, in the bases; `args` are `MoeTrainingArguments`.

    Models that are sharded by expert parallelism or by accelerate's FSDP are saved in shards. So are models on a
    single process with `expert_parallel_size` other than 1, so that the run can be resumed with more processes.

    The Trainer itself does not save the optimizer of a model sharded by `DistributedConfig`. For accelerate's FSDP, it
    has a format that only FSDP can read.
    """

    def __init__(self, model=None, args=None, **kwargs):
        is_sharded = getattr(model, "is_distributed_loading_by_transformers", False)
        if not is_sharded:
            super().__init__(model=model, args=args, **kwargs)
        else:
            save_only_model, args.save_only_model = args.save_only_model, True  # passes the Trainer's check
            try:
                super().__init__(model=model, args=args, **kwargs)
            finally:
                args.save_only_model = save_only_model
        self.saves_shards = is_sharded or self.is_fsdp_enabled or self.args.expert_parallel_size != 1

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.saves_shards:
            super().save_model(output_dir, _internal_call)
        elif _internal_call and output_dir is not None and not self.args.save_only_model:
            self._save_shards(Path(output_dir))
        elif self.is_fsdp_enabled:  # the Trainer would only save with accelerate's FULL_STATE_DICT
            self._save(output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.saves_shards or self.args.world_size == 1:
            return super()._save(output_dir, state_dict)
        # The first process may write into a temporary folder, and all processes must write into the same files.
        (folder,) = broadcast_object_list([str(output_dir or self.args.output_dir)])
        self._save_all_but_weights(Path(folder))
        write_weights(self.accelerator.unwrap_model(self.model), Path(folder))
        if self.args.should_save:
            torch.save(self.args, Path(folder, "training_args.bin"))

    def _save_shards(self, folder: Path) -> None:
        self._save_all_but_weights(folder)
        self.accelerator.wait_for_everyone()
        save_weights(self.accelerator.unwrap_model(self.model), folder)

    def _save_all_but_weights(self, folder: Path) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder.mkdir(parents=True, exist_ok=True)
            model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
            model.config.dtype = str(model.dtype).removeprefix("torch.")  # as save_pretrained does
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saves_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(output_dir, OPTIMIZER_FOLDER)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process then writes trainer_state.json, which marks the checkpoint as complete.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if is_sharded_checkpoint(resume_from_checkpoint):
            _check_no_more_weights(self.model, resume_from_checkpoint)
            _load_model_checkpoint_distributed(self.model, resume_from_checkpoint)
        elif self.saves_shards:
            raise InputError(
                f"resume_from_checkpoint={resume_from_checkpoint} is of a run without expert_parallel_size and FSDP: "
                "resume without them, or start a new run from its weights with --model_name_or_path"
            )
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded_checkpoint(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint, OPTIMIZER_FOLDER))
        schedule, own = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True), self.lr_scheduler.state_dict()
        for name, values in schedule.items():
            # One entry per parameter group. More kinds of sharding give more groups, all with the same learning rate.
            if isinstance(values, list):
                schedule[name] = values[:1] * len(own[name])
        self.lr_scheduler.load_state_dict(schedule)

    def _load_best_model(self) -> None:
        if is_sharded_checkpoint(self.state.best_model_checkpoint):
            _load_model_checkpoint_distributed(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
