"""Checks of what a model is given, one line each for what is wrong."""

import torch

# Keywords that `capture_outputs` of the library reads, around the forwards that record something.
RECORDING_KEYWORDS = ("output_hidden_states", "output_router_logits", "output_attentions")


def check_keywords(model: torch.nn.Module, keywords: dict) -> None:
    """Refuse a keyword that no part of the model uses.

    The forwards take `**kwargs` for `RECORDING_KEYWORDS` only, and hand them down to the part that records.

    Raises:
        TypeError: as Python's for an unknown keyword.
    """
    for name in keywords:
        if name not in RECORDING_KEYWORDS:
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}")


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse an id outside of the vocabulary, which a GPU would answer with a crash of the whole process."""
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.device.type == "meta":
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds {low if low < 0 else high}, allowed are 0 to vocab_size - 1 = {vocab_size - 1}"
        )


def padding_mask(
    name: str, mask: torch.Tensor | None, hidden_states: torch.Tensor, has_past: bool = True
) -> torch.Tensor | None:
    """(B, S) bool for the positions of `hidden_states` (B, S, D), or None when there is no padding among them.

    Args:
        name: what errors call the mask.
        mask: (B, S), 0 for padding, or with `has_past` (B, S or more), of which the last S positions count. None: no
            padding.
        has_past: whether positions may stand before those of `hidden_states`.
    """
    if mask is None:
        return None
    batch, length = hidden_states.shape[:2]
    fits = mask.dim() == 2 and mask.shape[0] == batch
    if not fits or mask.shape[1] < length or (mask.shape[1] > length and not has_past):
        expected = f"({batch}, {length} or more)" if has_past else f"({batch}, {length})"
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
    mask = mask[:, mask.shape[1] - length :].to(hidden_states.device, torch.bool)
    # A compiled or exported graph serves every mask.
    return None if not torch.compiler.is_compiling() and mask.all() else mask
