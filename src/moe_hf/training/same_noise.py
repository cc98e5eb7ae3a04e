"""Keeps evaluations from changing the noise of the training steps after them, for the plain `Trainer`."""

import torch
from transformers import TrainerCallback


class SameNoiseCallback(TrainerCallback):
    """Gives the steps after an evaluation the gating noise and dropout that they have without that evaluation.

    A plain `Trainer` changes them. Each pass of a `DataLoader` draws a seed from torch's global generator, and on a
    CPU noise and dropout come from the same generator. The Trainers of this package restore the random state.

    The callback covers evaluations by `eval_strategy` and `eval_on_start`. Pass it as `callbacks=[...]` or by
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
        if self._states is None:  # evaluated outside of a training
            return
        torch.set_rng_state(self._states[0])
        torch.cuda.set_rng_state_all(self._states[1])

    def on_train_end(self, args, state, control, **kwargs):
        self._states = None

    def _keep(self) -> None:
        self._states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
