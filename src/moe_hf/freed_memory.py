"""Keeps freed memory in the process, so that a training step does not fetch the same pages from the system again.

glibc returns large freed blocks to the system. The next step's gradients and logits then wait for fresh pages, at
about 1 to 2 GB/s on a CPU. docs/LOG.md (2026-11-30) compares the times with and without `keep_freed_memory`.
"""

import ctypes
import os
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's `malloc` reuse freed memory for the rest of the process. Call it before a training on a CPU.

    The training commands call this function automatically. `MOE_HF_KEEP_MEMORY=0` turns it off.

    Returns:
        Whether freed memory is kept: False with a C library other than glibc, or when it is turned off.
    """
    if os.environ.get("MOE_HF_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block gets a separate mapping, and the heap is never trimmed.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
