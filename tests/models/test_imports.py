"""Imports of the model code: Transformers scans them in the source text to copy the code to the Hub."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import moe_hf.models
from moe_hf import LstmMoeConfig
from moe_hf.models import lstm_kernel, segment_experts
from moe_hf.models.lstm import Lstm

FOLDER = Path(moe_hf.models.__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py")
LIBRARIES = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
OPTIONAL = {"triton_kernels.py": {"triton"}}
FAMILIES = ("lstm_moe", "gnmt")


def import_lines(name):
    """Every line that a text scan would take for an import, docstrings included."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.match(r"\s*(from\s+\S+\s+import\b|import\s+\S+)", line)]


def siblings(name):
    found = set()
    for line in import_lines(name):
        match = re.match(r"\s*from \.(\w+) import ", line)
        if match:
            found.add(match[1])
    return found


def all_siblings(name):
    """Names of the files that a file needs, directly or through another."""
    found, todo = set(), siblings(name)
    while todo:
        sibling = todo.pop()
        if sibling not in found:
            found.add(sibling)
            todo |= siblings(f"{sibling}.py")
    return found


@pytest.mark.parametrize("name", FILES)
def test_model_code_imports_only_libraries_and_siblings(name):
    for line in import_lines(name):
        line = line.partition("  #")[0].strip()
        sibling = re.fullmatch(r"from \.(\w+) import (\(|\w+(, \w+)*)", line)
        if sibling:
            assert f"{sibling[1]}.py" in FILES, line
        else:
            library = re.fullmatch(r"(?:from|import) (\w+)[\w.]*(?: .*)?", line)
            assert library and library[1] in LIBRARIES | OPTIONAL.get(name, set()), line


@pytest.mark.parametrize("name", FILES)
def test_the_copier_finds_the_files_that_a_file_needs(name):
    copied = {Path(path).stem for path in get_relative_import_files(FOLDER / name)}
    assert copied == all_siblings(name)


@pytest.mark.parametrize("name", [name for name in FILES if any(family in name for family in FAMILIES)])
def test_the_two_families_never_import_each_other(name):
    other = next(family for family in FAMILIES if family not in name)
    assert not [needed for needed in all_siblings(name) if other in needed]


def copy_of(module):
    """Executes the module's file again under another name, in a separate package."""
    package = types.ModuleType("copy_of_models")
    package.__path__ = [str(Path(module.__file__).parent)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"copy_of_models.{module.__name__.rpartition('.')[2]}")


@pytest.fixture
def copies_are_forgotten():
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "copy_of_models"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", FILES)
def test_the_library_asks_for_no_optional_package(name):
    """`trust_remote_code` refuses a file with an import that is not there, unless a `try` is around it."""
    assert set(get_imports(FOLDER / name)) <= LIBRARIES


@pytest.mark.usefixtures("copies_are_forgotten")
def test_copies_of_the_kernels_work_beside_the_originals():
    """As when a checkpoint from the Hub brings its own code."""
    x, state = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 4)
    lstm = Lstm(LstmMoeConfig(hidden_size=4))
    experts = (x[0], torch.tensor([[0], [1], [1]]), torch.ones(3, 1), torch.randn(2, 5, 4), torch.randn(2, 4, 5), True)
    kernels = (lstm_kernel, segment_experts)
    results = []
    for first, second in (kernels, [copy_of(kernel) for kernel in kernels], kernels):
        output = first.lstm_sequence(lstm, x, None, state, state)[0].sum() + second._experts(*experts)[0].sum()
        results.append((output, torch.autograd.grad(output, x)[0]))
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(grad, results[0][1])
