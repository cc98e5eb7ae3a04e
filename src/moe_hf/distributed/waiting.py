"""Waits for another process without a time limit, unlike a collective, which has a timeout.

The processes count themselves in the store that formed their group. A collective starts only after all have arrived.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils import broadcast_object_list
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainingArguments

from ..errors import InputError

LONGEST_PAUSE = 0.5  # seconds between two checks
_meetings = itertools.count()


class Meeting:
    """A barrier without a timeout. Every process must create its meetings in the same order.

    Args:
        training_args: the training arguments; the process group exists.
    """

    def __init__(self, training_args: TrainingArguments):
        self.size = training_args.world_size
        self.store = _get_default_store()
        # After a restart, torchrun may hand over the store of the processes before.
        self.key = f"moe_hf/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}"

    def arrive(self) -> None:
        """Count this process without waiting."""
        self.store.add(self.key, 1)

    def wait(self) -> None:
        """Return when all processes have arrived."""
        pause = 0.001
        while self.store.add(self.key, 0) < self.size:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


@contextmanager
def local_rank_zero_first(training_args: TrainingArguments) -> Iterator[None]:
    """Let the first process of each machine run the block while the other processes wait; they run it afterwards.

    Unlike `TrainingArguments.main_process_first`, the wait may exceed `ddp_timeout`.

    Args:
        training_args: the training arguments.
    """
    if training_args.world_size == 1:
        yield
        return
    meeting = Meeting(training_args)
    is_first = training_args.local_process_index == 0
    if not is_first:
        meeting.arrive()
        meeting.wait()
    try:
        yield
    finally:
        if is_first:
            meeting.arrive()
    if is_first:
        meeting.wait()


def broadcast_from_rank_zero(make: Callable, training_args: TrainingArguments):
    """Call `make` on the first process, without a time limit, and return its result on every process.

    Args:
        make: a function without arguments.
        training_args: the training arguments.

    Raises:
        InputError: `make` raises it on the first process. Every process raises the same error.
    """
    if training_args.world_size == 1:
        return make()
    meeting, outcome = Meeting(training_args), [None]
    if training_args.process_index == 0:
        try:
            outcome[0] = make()
        except InputError as error:
            outcome[0] = error
        finally:
            meeting.arrive()
    else:
        meeting.arrive()
    meeting.wait()
    (made,) = broadcast_object_list(outcome)
    if isinstance(made, InputError):
        raise made
    return made
