"""Whether a process reuses freed memory, measured by the page faults of a separate process."""

import os
import platform
import subprocess
import sys

import pytest

from moe_hf import freed_memory

CODE = """
import resource, sys
import torch
import runpy
print(runpy.run_path(sys.argv[1])["keep_freed_memory"]())
for _ in range(8):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is for glibc's malloc")
def test_freed_memory_is_taken_again():
    faults = {}
    for setting in ("0", "1"):
        environment = os.environ | {"MOE_HF_KEEP_MEMORY": setting}
        done = subprocess.run(
            [sys.executable, "-c", CODE, freed_memory.__file__],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        kept, faults[setting] = done.stdout.split()
        assert kept == str(setting == "1")
    # 40 times 64 MiB: 655,360 pages of 4 KiB. A few times a small block may lie in the way of the freed memory.
    assert int(faults["1"]) * 10 < int(faults["0"])
