"""Which experts a text uses."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.balancing import cv_squared
from ..models.gating import GateOutput
from ..models.moe import MoeBlock


def layer_name(module_name: str) -> str:
    """A module's name without those of the models around it, PEFT's included: "layers.1", "encoder.layers.2"."""
    return module_name.removeprefix("base_model.model.").removeprefix("model.")


class RoutingTotals(NamedTuple):
    """What one layer's experts got: `importance` (E,), the sum of gate values, and `tokens` (E,), the counts."""

    importance: torch.Tensor
    tokens: torch.Tensor


def moe_layers(model: nn.Module) -> dict[str, MoeBlock]:
    """The MoE layers by name: "layers.1", or of a translation model "encoder.layers.1"."""
    modules = model.named_modules()
    return {layer_name(name): module for name, module in modules if isinstance(module, MoeBlock)}


@contextmanager
def observe_gates(model: nn.Module, observe: Callable[[str, GateOutput], None]) -> Iterator[None]:
    """Watch the gates of a model in every forward pass inside the `with` block.

    The library's own recording (`output_router_logits`) has logits only, and of a hierarchical gate those over the
    groups, so neither which experts were chosen nor the gate values.

    Args:
        model: has `MoeBlock` layers.
        observe: called with the name of the layer and what its gate decided.
    """
    hooks = [
        block.gate.register_forward_hook(lambda gate, inputs, output, name=name: observe(name, output))
        for name, block in moe_layers(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def routing_totals(model: nn.Module) -> Iterator[dict[str, RoutingTotals]]:
    """Add up what each expert of each MoE layer gets from the forward passes inside the `with` block.

    Yields:
        {name of the layer ("layers.1"): totals}, filled by every pass that computes balancing statistics. The tokens
        sum up to k times the number of tokens, with the thresholds of strictly balanced gating only about that.
    """
    totals: dict[str, RoutingTotals] = {}

    def add(name: str, output: GateOutput) -> None:
        if output.tokens_per_expert is None:
            return
        seen = RoutingTotals(output.importance.detach().double().cpu(), output.tokens_per_expert.double().cpu())
        if name in totals:
            seen = RoutingTotals(*(old + new for old, new in zip(totals[name], seen, strict=True)))
        totals[name] = seen

    with observe_gates(model, add):
        yield totals


@torch.no_grad()
def expert_load(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, lines: Iterable[str], batch_size: int = 64
) -> dict[str, torch.Tensor]:
    """Count the tokens that each expert gets from a text, without noise.

    Args:
        model: has `MoeBlock` layers; it is put into evaluation mode for the count.
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
                model.base_model(**batch.to(model.device), output_statistics=True, use_cache=False)
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
