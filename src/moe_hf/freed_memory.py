"""Keeps freed memory in the process, so that a training step does not fetch the same pages from the system again.

glibc gives large blocks back to the system when they are freed. The next step's gradients and logits then wait for
fresh pages, at about 1 to 2 GB/s on a CPU (benchmarks/results/memory.md has the times with and without this).
"""

import ctypes
import os
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's `malloc` reuse what is freed, for the rest of the process; call it before a training on a CPU.

    The training commands call it by themselves. `MOE_HF_KEEP_MEMORY=0` turns it off.

    Returns:
        Whether it is so now: False with another C library than glibc, or when it is turned off.
    """
    if os.environ.get("MOE_HF_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block is a mapping of its own, and the heap is never trimmed.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
