"""Keeps evaluations from changing the noise of later training steps, for the plain `Trainer`."""

import torch
from transformers import TrainerCallback


class SameNoiseCallback(TrainerCallback):
    """Makes gating noise and dropout after an evaluation the same as without that evaluation.

    In a plain `Trainer` they differ: each pass of a `DataLoader` draws a seed from torch's global generator, and on a
    CPU noise and dropout use the same generator. The Trainers of this package restore the random state.

    The callback covers evaluations by `eval_strategy` and `eval_on_start`. Pass it as `callbacks=[...]` or with
    `add_callback`: it must come after the Trainer's own callbacks, which decide whether to evaluate.
    """

    def __init__(self):
        self._states = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.eval_on_start:
            self._keep()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            self._keep()

    on_epoch_end = on_step_end

    def on_evaluate(self, args, state, control, **kwargs):
        if self._states is None:  # an evaluation outside a training
            return
        torch.set_rng_state(self._states[0])
        torch.cuda.set_rng_state_all(self._states[1])

    def on_train_end(self, args, state, control, **kwargs):
        self._states = None

    def _keep(self) -> None:
        self._states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
