"""Decides whether the host may read a tensor's values while a model runs."""

import torch

HOST_DEVICES = {"cpu"}


def is_on_host(device: torch.device) -> bool:
    """Return whether a device's values are in the host's memory."""
    return device.type in HOST_DEVICES


def host_reads_are_free(device: torch.device) -> bool:
    """Return whether the host can read values without waiting for a device and without breaking a compiled graph.

    If not, shapes must not depend on values: the host would wait for all work in the device's queue.
    """
    return is_on_host(device) and not torch.compiler.is_compiling()
