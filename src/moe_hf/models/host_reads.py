"""Where the host may read a tensor's values while a model runs."""

import torch

HOST_DEVICES = {"cpu"}


def is_on_host(device: torch.device) -> bool:
    """Whether a value is in the host's own memory."""
    return device.type in HOST_DEVICES


def host_reads_are_free(device: torch.device) -> bool:
    """Whether a value can be read without waiting for a device, and without breaking a compiled graph.

    Elsewhere no shape may depend on values: the host would wait for all work that is queued on the device.
    """
    return is_on_host(device) and not torch.compiler.is_compiling()
