"""The loss of held-out text, summed over its tokens, and the perplexities that follow from it."""

from collections.abc import Iterable

import torch
from transformers import DynamicCache, PreTrainedModel

from ..models.cache import CACHE_NAME
from ..models.configuration_gnmt_moe import GnmtMoeConfig
from ..models.task_loss import summed_cross_entropy
from .metrics import load_metric


@torch.no_grad()
def summed_stream_loss(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], carry_state: bool = False
) -> torch.Tensor:
    """Return the summed loss of a language model over a stream of tokens.

    Args:
        model: the model, in evaluation mode.
        batches: windows of the stream, on the model's device, with `shift_labels`. Row i of a window continues row i
            of the previous window.
        carry_state: whether each window starts from the state after the previous window; otherwise from zero.

    Returns:
        (2,) float64: nats, and the number of scored tokens.
    """
    cache = DynamicCache(config=model.config) if carry_state else None
    state = {CACHE_NAME: cache, "use_cache": carry_state, "skip_logits": True}
    return _sum(
        # num_items_in_batch=1: the sum over the tokens, not the mean
        (model(**batch, **state, num_items_in_batch=1).loss, batch["shift_labels"])
        for batch in batches
    )


@torch.no_grad()
def summed_pairs_loss(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the summed loss of a translation model over sentence pairs, without label smoothing.

    Args:
        model: a model in evaluation mode, of this package, or another encoder-decoder model that shifts labels.
        batches: batches on the model's device, with `labels`.

    Returns:
        (2,) float64: nats, and the number of scored tokens.
    """
    is_ours = model.config.model_type == GnmtMoeConfig.model_type  # an adapter keeps the model type

    def nats(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if is_ours:
            return model(**batch, num_items_in_batch=1).loss
        return summed_cross_entropy(model(**batch).logits, batch["labels"])  # the loss of other models is a mean

    return _sum((nats(batch), batch["labels"]) for batch in batches)


def _sum(losses: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    total = None
    for loss, labels in losses:
        both = torch.stack([loss.double(), (labels != -100).sum().double()])
        total = both if total is None else total + both
    return torch.zeros(2, dtype=torch.float64) if total is None else total


def perplexities(nats: float, num_tokens: float, num_words: int) -> dict[str, float]:
    """Return loss (nats per token), perplexity_per_token, perplexity_per_word and bits_per_word of a summed loss.

    Args:
        nats: the sum of the losses.
        num_tokens: number of scored tokens.
        num_words: number of words of the text, where each line's end counts as a word.
    """
    metric = load_metric("stream_perplexity")
    metric.add(nll=nats, num_tokens=int(num_tokens), num_words=num_words)
    return {"loss": nats / num_tokens, **metric.compute()}
