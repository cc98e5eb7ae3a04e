"""Trains with `expert_gradients="factored"`: exact clipping, and the exchange of rows between processes."""

import math

from torch.nn.parallel import DistributedDataParallel

from ..distributed.gathered_rows import gather_rows
from ..errors import InputError
from ..models.factored_gradients import use_factored_gradients
from .gradient_norm import clip_grad_norm_
from .optimizer import expert_parameters


class FactoredGradientsMixin:
    """A mixin: list it before `ShardedCheckpointMixin` in a Trainer's bases; `args` are `MoeTrainingArguments`."""

    def train(self, *args, **kwargs):
        if self.args.expert_gradients == "dense":
            return super().train(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise InputError(
                "expert_gradients=factored does not work with experts sharded by FSDP: use expert_gradients=dense"
            )
        try:
            use_dense_gradients = use_factored_gradients(self.model)
        except ValueError as error:
            raise InputError(f"expert_gradients=factored: {error}") from error
        experts = set(expert_parameters(self.model))
        names = [name for name, parameter in self.model.named_parameters() if parameter in experts]
        # DDP would wait for the experts' gradients; the processes exchange rows instead.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        try:
            return super().train(*args, **kwargs)
        finally:
            use_dense_gradients()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.saves_shards and self.args.expert_gradients == "factored":
            self.optimizer.optimizer.settle_moments()  # the sharded format does not store how long experts were idle
        super()._save_optimizer_and_scheduler(output_dir)

    def _clip_grad_norm(self, model):
        if self.args.expert_gradients == "dense":
            return super()._clip_grad_norm(model)
        gather_rows(model)
        return clip_grad_norm_(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self.args.expert_gradients == "factored":
            gather_rows(model)
            grad_norm = clip_grad_norm_(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)
