"""Early stopping that a resumed run continues."""

import logging

from transformers import EarlyStoppingCallback

logger = logging.getLogger(__name__)


class ResumableEarlyStopping(EarlyStoppingCallback):
    """The library's callback, whose count goes on after a resumption, and which says why it stops.

    The library keeps the count in the checkpoint, but restores it only with
    `restore_callback_states_from_checkpoint=True`.

    Args:
        early_stopping_patience: stop after this many evaluations in a row without a better `metric_for_best_model`.
        early_stopping_threshold: change of the metric above which an evaluation counts as better.
    """

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self._has_said = False

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._has_said = False
        kept = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        count = self.early_stopping_patience_counter
        is_early = count >= self.early_stopping_patience and state.global_step < state.max_steps
        if is_early and not self._has_said:  # the run evaluates once more at its end
            self._has_said = True
            logger.info(
                f"stops after step {state.global_step} of {state.max_steps}: no better {args.metric_for_best_model} "
                f"than {state.best_metric:.4g} in {count} evaluations in a row"
            )
