"""Observes which experts a text uses."""

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
    """Return a module's name without the names of surrounding models (also PEFT's), such as "encoder.layers.2"."""
    return module_name.removeprefix("base_model.model.").removeprefix("model.")


class RoutingTotals(NamedTuple):
    """The load of one layer's experts: `importance` (E,), the sums of gate values, and `tokens` (E,), the counts."""

    importance: torch.Tensor
    tokens: torch.Tensor


def moe_layers(model: nn.Module) -> dict[str, MoeBlock]:
    """Return {name: MoE layer}, with names such as "layers.1", or "encoder.layers.1" in a translation model."""
    modules = model.named_modules()
    return {layer_name(name): module for name, module in modules if isinstance(module, MoeBlock)}


@contextmanager
def observe_gates(model: nn.Module, observe: Callable[[str, GateOutput], None]) -> Iterator[None]:
    """Observe the gates of a model in every forward pass inside the `with` block.

    The library's recording (`output_router_logits`) is not enough: it has only logits, without the chosen experts and
    gate values, and for a hierarchical gate only the logits over the groups.

    Args:
        model: a model with `MoeBlock` layers.
        observe: called with the layer's name and the gate's output.
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
    """Sum the load of each expert in each MoE layer over the forward passes inside the `with` block.

    Yields:
        {name of the layer ("layers.1"): totals}, updated by every pass that computes balancing statistics. The counts
        sum to k times the number of tokens; with the thresholds of strictly balanced gating, only approximately.
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
    """Count the tokens of each expert in a text, without noise.

    Args:
        model: a model with `MoeBlock` layers; it is in evaluation mode during the count.
        tokenizer: the model's tokenizer.
        lines: the text; each line is a separate sequence.
        batch_size: number of lines at once.

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
    """Return CV(Load), max/mean load and the number of dead experts of one layer, from its token counts (E,)."""
    return {
        "cv_load": cv_squared(tokens).sqrt().item(),
        "max_over_mean_load": (tokens.max() / tokens.mean()).item(),
        "dead_experts": int((tokens == 0).sum()),
    }
