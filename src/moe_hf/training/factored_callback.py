"""Factored gradients of experts in Transformers' Trainer."""

from transformers import TrainerCallback

from ..distributed.gathered_rows import gather_rows
from ..errors import InputError
from ..models.factored_gradients import use_factored_gradients
from .gradient_norm import clip_grad_norm_
from .optimizer import FactoredAdam


class FactoredGradientsCallback(TrainerCallback):
    """Turns factored gradients on for a training, and clips by the exact global norm.

    This callback is for Transformers' Trainer; this package's trainers have `expert_gradients="factored"` instead.

        Trainer(model, args, optimizers=(FactoredAdam.for_model(model, lr=1e-3), None),
                callbacks=[FactoredGradientsCallback(max_grad_norm=1.0)])

    Set `args.max_grad_norm` to 0, because the Trainer's clipping does not see the experts.

    Args:
        max_grad_norm (float | None): maximal norm of all gradients together; None for no clipping.
    """

    def __init__(self, max_grad_norm: float | None = 1.0):
        self.max_grad_norm = max_grad_norm
        self._switch_back = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.max_grad_norm:
            raise InputError(
                f"max_grad_norm={args.max_grad_norm} would clip without the experts: set it to 0, and use "
                "FactoredGradientsCallback(max_grad_norm=...) instead"
            )
        if not isinstance(getattr(optimizer, "optimizer", optimizer), FactoredAdam):
            raise InputError("factored gradients need optimizers=(FactoredAdam.for_model(model), None)")
        self._switch_back = use_factored_gradients(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gather_rows(model)
        if self.max_grad_norm is not None:
            clip_grad_norm_(model, self.max_grad_norm)

    def on_train_end(self, args, state, control, **kwargs):
        if self._switch_back is not None:
            self._switch_back()
            self._switch_back = None
