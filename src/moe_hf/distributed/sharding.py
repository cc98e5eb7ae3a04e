"""Models of which every process holds a part: one copy of each expert over all of them (section 3.1)."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from ..errors import InputError
from ..models.sharding_checks import check_same_everywhere


def check_same_run_everywhere(arguments: dict, training_args: TrainingArguments) -> None:
    """Check that all processes of a run were started alike.

    Args:
        arguments: of this process, as plain values.
        training_args: those of the run.

    Raises:
        InputError: the arguments differ; raised on every process.
    """
    if training_args.world_size > 1:
        try:
            check_same_everywhere(arguments)
        except ValueError as error:
            raise InputError(str(error)) from error


def distributed_config(training_args: TrainingArguments) -> DistributedConfig | None:
    """What `expert_parallel_size` says for this number of processes; None: no model is sharded by it.

    Raises:
        InputError: the size does not divide the number of processes.
    """
    size, processes = training_args.expert_parallel_size, training_args.world_size
    if size == -1:
        size = processes
    if processes % size:
        raise InputError(f"expert_parallel_size={size} must divide the number of processes, {processes}, or be -1")
    return None if size == 1 else DistributedConfig(fsdp_size=processes, ep_size=size)


def shard_new_model(
    build: Callable[[], PreTrainedModel], config: DistributedConfig, training_args: TrainingArguments
) -> PreTrainedModel:
    """Make a model and shard it: the first process alone holds the whole of it, and for a short time.

    The weights go through a folder in `output_dir`, which all processes must see, as they must for checkpoints. To
    draw each part's weights where it is to be would take less, but on a CPU torch's DTensors draw the same for all
    parts.

    Args:
        build: makes the whole model.
        config: how the model is sharded.
        training_args: those of the run.

    Raises:
        InputError: on every process, what `build` raises on the first, and what does not allow sharding.
    """
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            model = build()
            Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
            outcome[0] = tempfile.mkdtemp(prefix="new-model-", dir=training_args.output_dir)
            model.save_pretrained(outcome[0])
            model_class, implementation = type(model), model.config._experts_implementation
            outcome[1] = (model_class, implementation)
        except (ValueError, OSError) as error:  # InputError is a ValueError
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    folder, made = outcome
    if isinstance(made, Exception):
        raise InputError(str(made))
    model_class, implementation = made
    try:
        return model_class.from_pretrained(folder, experts_implementation=implementation, distributed_config=config)
    except ValueError as error:
        raise InputError(str(error)) from error
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
