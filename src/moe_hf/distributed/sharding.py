"""Creates sharded models, with one copy of each expert over all processes (section 3.1)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from ..errors import InputError
from ..models.sharding_checks import check_same_everywhere
from .drawing import build_without_experts


def check_same_run_everywhere(arguments: dict, training_args: TrainingArguments) -> None:
    """Check that all processes of a run have the same arguments.

    Args:
        arguments: the arguments of this process, as plain values.
        training_args: the training arguments.

    Raises:
        InputError: the arguments differ. Every process raises this error.
    """
    if training_args.world_size > 1:
        try:
            check_same_everywhere(arguments)
        except ValueError as error:
            raise InputError(str(error)) from error


def distributed_config(training_args: TrainingArguments) -> DistributedConfig | None:
    """Return the sharding for `expert_parallel_size` and this number of processes; None: models are not sharded.

    Raises:
        InputError: the size does not divide the number of processes.
    """
    size, processes = training_args.expert_parallel_size, training_args.world_size
    if size == -1:
        size = processes
    if processes % size:
        raise InputError(f"expert_parallel_size={size} must divide the number of processes, {processes}, or be -1")
    return None if size == 1 else DistributedConfig(fsdp_size=processes, ep_size=size)


def shard_new_model(build: Callable[[], PreTrainedModel], config: DistributedConfig) -> PreTrainedModel:
    """Make a sharded model with the same weights as on a single process; each process holds only its own experts.

    Every process draws the values of all experts, one piece at a time, and keeps its own. torch's DTensors are not
    used, because on a CPU they draw the same values for all parts.

    Args:
        build: function that makes the whole model, with torch's default generator.
        config: the sharding.

    Raises:
        InputError: `build` fails, or the model cannot be sharded. Every process raises this error.
    """
    random_state = [torch.get_rng_state()]
    dist.broadcast_object_list(random_state)
    torch.set_rng_state(random_state[0])
    try:
        model, state = build_without_experts(build)
        return type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            dtype=model.dtype,
            experts_implementation=model.config._experts_implementation,
            distributed_config=config,
        )
    except ValueError as error:  # InputError is a ValueError
        raise InputError(str(error)) from error
