"""Which experts a text uses."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..models.moe import MoeBlock


@contextmanager
def counting_tokens(model) -> Iterator[dict[str, torch.Tensor]]:
    """Count the tokens that each expert of each MoE layer gets from the forward passes inside the `with` block.

    Yields:
        {name of the layer ("layers.1"): (E,) counts}, filled by every pass that computes balancing statistics; their
        sum is k times the number of tokens, with the thresholds of strictly balanced gating only about that.
    """
    counts: dict[str, torch.Tensor] = {}

    def observe(name):
        def hook(module, inputs, outputs):
            if outputs[3] is not None:
                counts[name] = counts.get(name, 0) + outputs[3].cpu()

        return hook

    hooks = [
        module.register_forward_hook(observe(name.removeprefix("model.")))
        for name, module in model.named_modules()
        if isinstance(module, MoeBlock)
    ]
    try:
        yield counts
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
        as `counting_tokens`.
    """
    lines, was_training = list(lines), model.training
    model.eval()
    try:
        with counting_tokens(model) as counts:
            for start in range(0, len(lines), batch_size):
                batch = tokenizer(lines[start : start + batch_size], return_tensors="pt", padding=True)
                model.base_model(**batch.to(model.device), output_aux_loss=True, use_cache=False)
    finally:
        model.train(was_training)
    return counts


def load_statistics(counts: torch.Tensor) -> dict[str, float]:
    """CV(Load), max/mean load and the number of dead experts of one layer, from its (E,) token counts."""
    mean = counts.mean()
    return {
        "cv_load": (counts.std(correction=0) / mean).item(),
        "max_over_mean_load": (counts.max() / mean).item(),
        "dead_experts": int((counts == 0).sum()),
    }
