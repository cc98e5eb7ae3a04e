"""Which experts a text uses."""

from collections.abc import Iterable

import torch

from ..models.moe import MoeBlock


@torch.no_grad()
def expert_load(model, tokenizer, lines: Iterable[str], batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Count the tokens that each expert of each MoE layer gets from a text, without noise.

    Args:
        model: a model with `MoeBlock` layers; it is put into evaluation mode for the count.
        tokenizer: its tokenizer.
        lines: the text; each line is a sequence of its own.
        batch_size: lines at once.

    Returns:
        {name of the layer ("layers.1"): (E,) counts}; their sum is k times the number of tokens.
    """
    counts: dict[str, torch.Tensor] = {}

    def observe(name):
        def hook(module, inputs, outputs):
            counts[name] = counts.get(name, 0) + outputs[3].cpu()

        return hook

    hooks = [
        module.register_forward_hook(observe(name[name.index("layers.") :]))
        for name, module in model.named_modules()
        if isinstance(module, MoeBlock)
    ]
    was_training = model.training
    model.eval()
    try:
        lines = list(lines)
        for start in range(0, len(lines), batch_size):
            batch = tokenizer(lines[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
            model.base_model(**batch, output_aux_loss=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return counts
