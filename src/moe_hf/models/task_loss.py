"""The loss of a whole batch from its parts: the task's nats, their number, and the balancing losses.

Shape suffixes: V vocabulary.
"""

import torch
from torch import nn

IGNORED = -100


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Nats of all scored tokens together, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) int64, -100 where nothing is scored.
        label_smoothing: share of the target's probability that is spread over the whole vocabulary.

    Returns:
        a scalar, 0 with zero gradients when no token is scored.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def loss_of_batch(
    nats: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    aux_loss: torch.Tensor | None,
) -> torch.Tensor:
    """The mean of the nats, and the balancing losses by this micro-batch's share of the scored tokens.

    Args:
        nats: a scalar, the sum over the scored tokens.
        targets: int64, -100 where nothing is scored.
        num_items_in_batch: scored tokens of the whole batch of an optimizer step, over all micro-batches and
            processes; None: those of `targets`.
        aux_loss: the weighted balancing losses; None leaves them out.

    Returns:
        a scalar, finite also when no token is scored: then it is 0, and so is its gradient.
    """
    num_scored = (targets != IGNORED).sum().to(nats.device)
    if num_items_in_batch is None:
        num_items_in_batch = num_scored
    num_items_in_batch = torch.as_tensor(num_items_in_batch, device=nats.device).clamp(min=1)
    loss = nats / num_items_in_batch
    if aux_loss is not None:
        loss = loss + aux_loss.to(loss.device) * (num_scored / num_items_in_batch)
    return loss


def check_loss_is_ours(num_items_in_batch: torch.Tensor | int | None, has_labels: bool) -> None:
    """Refuse to be trained by a loss from which the balancing losses are missing.

    The Trainer takes the labels out of the batch for `label_smoothing_factor` and `compute_loss_func`, but still hands
    over the number of scored tokens.

    Raises:
        ValueError: there are no labels, but their number is given.
    """
    if num_items_in_batch is not None and not has_labels:
        raise ValueError(
            "num_items_in_batch is given without labels, so the loss is computed outside of the model, without its "
            "balancing losses: instead of the Trainer's label_smoothing_factor set label_smoothing in the model's "
            "configuration; with a compute_loss_func that adds outputs.aux_loss itself set "
            "model.accepts_loss_kwargs = False"
        )
