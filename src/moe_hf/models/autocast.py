"""Autocast of a device that may have none, like the meta device."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on the device; None where it is off or where the device has none."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
