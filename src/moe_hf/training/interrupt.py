"""Ctrl-C, or a scheduler's SIGTERM, ends a training after the step it is in, with a checkpoint to go on from."""

import logging
import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..errors import InterruptedRun

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """Saves a checkpoint and raises an `InterruptedRun` when a signal came during a step or an evaluation.

    On one process these are SIGINT (Ctrl-C) and SIGTERM, and a second signal does what it would do without this.
    Several processes all stop after the same step, and only for SIGINT, however often it comes. A launcher passes on
    the SIGINT that the terminal has sent already, and sends SIGTERM to processes that wait for one that died.

    Works in the main thread only, as signal handlers do; elsewhere signals do what they did before.
    """

    def __init__(self):
        self.received: int | None = None
        self._handlers = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = None
        self._is_single = args.world_size == 1
        for number in (signal.SIGINT, signal.SIGTERM) if self._is_single else (signal.SIGINT,):
            try:
                self._handlers[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread
                return

    def _receive(self, number, frame):
        if self.received is None:
            again = ", again: at once" if self._is_single else ""
            logger.warning(f"{signal.Signals(number).name}: stops after this step{again}")
        self.received = number
        if self._is_single:
            self.restore()

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.received = self._of_any_process(args.device)
        if self._ends(state):
            control.should_save = True

    # It comes between a step's end and its checkpoint, and takes long.
    on_evaluate = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self._ends(state):
            self.restore()
            raise InterruptedRun(
                f"interrupted after step {state.global_step} of {state.max_steps}, which is saved in "
                f"{args.output_dir}; the same command with --resume_from_checkpoint goes on",
                self.received,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def _ends(self, state) -> bool:
        return self.received is not None and state.global_step < state.max_steps

    def _of_any_process(self, device) -> int | None:
        received = torch.tensor(self.received or 0, device=device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return received.item() or None

    def restore(self) -> None:
        """Give the signals back; to be called when `train` raises something, of which a callback is not told."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
