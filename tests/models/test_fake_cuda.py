"""Both families on fake CUDA tensors: devices, dtypes, gradients and host reads of training and generation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import moe_hf

pytestmark = pytest.mark.gpu_path
HELPERS = Path(fake_cuda.__file__).parent


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What `fake_cuda` prints, run once for all cases."""
    if torch.backends.cuda.is_built():
        pytest.skip("torch is built with CUDA, whose guard cannot be replaced")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the guard with")
    library = tmp_path_factory.mktemp("guard") / "libguard.so"
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", str(HELPERS / "fake_cuda_guard.cpp"), *paths]
    built = subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(library)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the guard does not compile with this torch: {built.stderr.strip().splitlines()[-1]}")
    program = [sys.executable, str(HELPERS / "fake_cuda.py"), str(library)]
    environment = os.environ | {"PYTHONPATH": str(Path(moe_hf.__file__).parents[1])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", fake_cuda.cases())
def test_training_and_generation_stay_on_the_device(faults, case):
    assert faults[case] is None, faults[case]
