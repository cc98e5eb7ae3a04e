"""Reads the autocast state of any device, including devices without autocast, such as meta."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of the device; None if autocast is off or not available."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
