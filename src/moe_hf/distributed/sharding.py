"""Models of which every process holds a part: one copy of each expert over all of them (section 3.1)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from ..errors import InputError
from ..models.sharding_checks import check_same_everywhere
from .drawing import build_without_experts


def check_same_run_everywhere(arguments: dict, training_args: TrainingArguments) -> None:
    """Check that all processes of a run were started alike.

    Args:
        arguments: of this process, as plain values.
        training_args: the training arguments.

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


def shard_new_model(build: Callable[[], PreTrainedModel], config: DistributedConfig) -> PreTrainedModel:
    """Make a model of which each process draws and holds its own experts, with the weights of a single process.

    Every process draws the values of all experts, a piece at a time, and keeps its own. (On a CPU, torch's DTensors
    draw the same values for all parts.)

    Args:
        build: makes the whole model, from torch's generator of random numbers.
        config: how the model is sharded.

    Raises:
        InputError: on every process, what `build` raises, and what does not allow sharding.
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
    except ValueError as error:  # InputError is one
        raise InputError(str(error)) from error
