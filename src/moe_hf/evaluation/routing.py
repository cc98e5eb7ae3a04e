"""Which experts a text uses."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..models.balancing import cv_squared
from ..models.moe import MoeBlock


def layer_name(module_name: str) -> str:
    """A module's name without those of the models around it, PEFT's included: "layers.1", "encoder.layers.2"."""
    return module_name.removeprefix("base_model.model.").removeprefix("model.")


class RoutingTotals(NamedTuple):
    """What one layer's experts got: `importance` (E,), the sum of gate values, and `tokens` (E,), the counts."""

    importance: torch.Tensor
    tokens: torch.Tensor


@contextmanager
def routing_totals(model) -> Iterator[dict[str, RoutingTotals]]:
    """Add up what each expert of each MoE layer gets from the forward passes inside the `with` block.

    Yields:
        {name of the layer ("layers.1"): totals}, filled by every pass that computes balancing statistics. The tokens
        sum up to k times the number of tokens, with the thresholds of strictly balanced gating only about that.
    """
    totals: dict[str, RoutingTotals] = {}

    def observe(name):
        def hook(module, inputs, outputs):
            importance, tokens = outputs[1], outputs[3]
            if tokens is not None:
                seen = RoutingTotals(importance.detach().double().cpu(), tokens.double().cpu())
                if name in totals:
                    seen = RoutingTotals(*(old + new for old, new in zip(totals[name], seen, strict=True)))
                totals[name] = seen

        return hook

    hooks = [
        module.register_forward_hook(observe(layer_name(name)))
        for name, module in model.named_modules()
        if isinstance(module, MoeBlock)
    ]
    try:
        yield totals
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def expert_load(model, tokenizer, lines: Iterable[str], batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Count the tokens that each expert gets from a text, without noise.

    Args:
        model: a model with `MoeBlock` layers; it is put into evaluation mode for the count.
        tokenizer: its tokenizer.
        lines: the text; each line is a sequence of its own.
        batch_size: lines at once.

    Returns:
        {name of the layer ("layers.1"): (E,) counts}.
    """
    lines, was_training = list(lines), model.training
    model.eval()
    try:
        with routing_totals(model) as totals:
            for start in range(0, len(lines), batch_size):
                batch = tokenizer(lines[start : start + batch_size], return_tensors="pt", padding=True)
                model.base_model(**batch.to(model.device), output_aux_loss=True, use_cache=False)
    finally:
        model.train(was_training)
    return {layer: total.tokens for layer, total in totals.items()}


def load_statistics(tokens: torch.Tensor) -> dict[str, float]:
    """CV(Load), max/mean load and the number of dead experts of one layer, from its (E,) token counts."""
    return {
        "cv_load": cv_squared(tokens).sqrt().item(),
        "max_over_mean_load": (tokens.max() / tokens.mean()).item(),
        "dead_experts": int((tokens == 0).sum()),
    }
