"""Lets Ctrl-C or a scheduler's SIGTERM end a training after the current step, with a checkpoint to resume from."""

import logging
import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..errors import InterruptedRun

logger = logging.getLogger(__name__)


class InterruptCallback(TrainerCallback):
    """Saves a checkpoint and raises an `InterruptedRun` after a signal during a step or an evaluation.

    With one process, the signals are SIGINT (Ctrl-C) and SIGTERM. A second signal has its usual effect.

    With several processes, only SIGINT is handled, and all processes stop after the same step. Repeated SIGINTs are
    ignored: a launcher forwards the SIGINT that the terminal has already sent. SIGTERM is not handled, because a
    launcher sends it to processes that wait for a dead one.

    The callback works only in the main thread, like every signal handler. In other threads it changes nothing.
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
            except ValueError:  # not in the main thread
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

    # An evaluation comes between a step's end and its checkpoint, and takes long.
    on_evaluate = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self._ends(state):
            self.restore()
            advice = "resume by the same command with --resume_from_checkpoint"
            if args.save_only_model:
                advice = "it has no optimizer state (save_only_model), so the run cannot be resumed"
            raise InterruptedRun(
                f"interrupted after step {state.global_step} of {state.max_steps}, which is saved in "
                f"{args.output_dir}; {advice}",
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
        """Restore the signal handlers. Call it when `train` raises an error, because callbacks are not notified."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
