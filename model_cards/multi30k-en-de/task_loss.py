"""The summed loss of tokens or of whole texts, and the loss of a batch from this sum and the balancing losses.

Shape suffixes: B batch, L labels, V vocabulary.
"""

import torch
from torch import nn

IGNORED = -100


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the summed cross-entropy of all scored tokens in nats, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) int64, -100 for a token that is not scored.
        label_smoothing: share of the target's probability that is spread over the vocabulary.

    Returns:
        a scalar; 0 with zero gradients if no token is scored.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def problem_type_of(config, labels: torch.Tensor) -> str:
    """Return `config.problem_type`, or the library's guess from the number of labels and their dtype."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    is_class = not (labels.is_floating_point() or labels.dtype == torch.bool)
    return "single_label_classification" if is_class else "multi_label_classification"


def summed_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the sum of the squared errors, or the summed cross-entropy of all labels in nats, in at least float32.

    Args:
        logits: (B, L).
        labels: (B,) classes, -100 for a row that is not scored; or (B, L) numbers or probabilities, (B,) for L = 1.
        problem_type: "regression", "single_label_classification" or "multi_label_classification".
        label_smoothing: share of a class's probability that is spread over all classes.

    Raises:
        ValueError: the labels have another shape, or an unknown class.
    """
    num_labels = logits.shape[1]
    if problem_type == "single_label_classification":
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected ({len(logits)},), a class for each row"
            )
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_labels))]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])}, allowed are 0 to num_labels - 1 = {num_labels - 1}, and -100"
            )
        return summed_cross_entropy(logits, labels, label_smoothing)
    if labels.numel() != logits.numel():
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device, logits.dtype).view_as(logits)
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels, reduction="sum")
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def loss_of_batch(
    nats: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    aux_loss: torch.Tensor | None,
) -> torch.Tensor:
    """Return the mean of the nats, plus the balancing losses weighted by this micro-batch's share of scored tokens.

    Args:
        nats: a scalar, the sum over the scored tokens.
        targets: int64, -100 for a token that is not scored.
        num_items_in_batch: number of scored tokens in the whole batch of an optimizer step, over all micro-batches and
            processes; None: the scored tokens of `targets`.
        aux_loss: the weighted balancing losses; None: no balancing losses.

    Returns:
        a scalar. If no token is scored, the scalar and its gradient are 0.
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
    """Refuse a training whose loss lacks the balancing losses.

    With `label_smoothing_factor` or `compute_loss_func`, the Trainer removes the labels from the batch, but still
    passes the number of scored tokens.

    Raises:
        ValueError: the labels are missing, but their number is given.
    """
    if num_items_in_batch is not None and not has_labels:
        raise ValueError(
            "num_items_in_batch is given without labels, so the loss is computed outside of the model, without its "
            "balancing losses: instead of the Trainer's label_smoothing_factor, set label_smoothing in the model's "
            "configuration; with a compute_loss_func that adds outputs.aux_loss itself, set "
            "model.accepts_loss_kwargs = False"
        )
