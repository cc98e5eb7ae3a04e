"""Whole texts as classes or numbers: which token speaks for a text, and the loss.

Shape suffixes: B batch, S sequence, L labels.
"""

import torch
from torch import nn

from .task_loss import summed_cross_entropy


def last_token(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pad_token_id: int | None
) -> torch.Tensor | int:
    """Where each row's last real token stands, left or right padded: (B,), or -1 for the last position of all.

    Args:
        input_ids: (B, S), or None; the last that is not `pad_token_id` counts if there is no mask.
        attention_mask: (B, S), 0 for padding, or None.

    Raises:
        ValueError: several rows, and nothing tells which of their tokens are padding.
    """
    if attention_mask is not None:
        is_real_BS = attention_mask.bool()
    elif input_ids is not None and pad_token_id is not None:
        is_real_BS = input_ids != pad_token_id
    elif input_ids is not None and len(input_ids) > 1:
        raise ValueError(
            "pad_token_id=None, and no attention_mask: give one of them to find the last tokens of a batch"
        )
    else:
        return -1
    positions_S = torch.arange(is_real_BS.shape[1], device=is_real_BS.device)
    return (positions_S * is_real_BS).argmax(dim=-1)


def problem_type_of(config, labels: torch.Tensor) -> str:
    """`config.problem_type`, or the library's guess by the number of labels and their type."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    is_class = not (labels.is_floating_point() or labels.dtype == torch.bool)
    return "single_label_classification" if is_class else "multi_label_classification"


def summed_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The sum of the squared errors, or of the nats of all labels together, in at least float32.

    Args:
        logits: (B, L).
        labels: (B,) classes, -100 for a row that is not scored; or (B, L) numbers or probabilities, (B,) for L = 1.
        problem_type: "regression", "single_label_classification" or "multi_label_classification".
        label_smoothing: share of a class's probability that is spread over all classes.

    Raises:
        ValueError: labels of another shape, or a class that there is not.
    """
    num_labels = logits.shape[1]
    if problem_type == "single_label_classification":
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected ({len(logits)},), a class for each row"
            )
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
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
