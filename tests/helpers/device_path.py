"""Runs the models' code path for GPUs on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from moe_hf.models import host_reads


@contextmanager
def device_path() -> Iterator[None]:
    """Declares host reads expensive, so that the models use the code path whose shapes do not depend on values."""
    with mock.patch.object(host_reads, "HOST_DEVICES", set()):
        yield
