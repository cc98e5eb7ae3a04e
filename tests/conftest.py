"""Settings and fixtures of all tests.

Every test uses one thread: the tensors are tiny, and waiting for a second thread can cost more than it saves. No test
uses the network: a name that is not a folder is refused at once, without a search on the Hub.
"""

import os
import runpy
from pathlib import Path

# Set before torch, triton and huggingface_hub are imported; processes that tests start inherit the variables.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton's kernels run in its interpreter, on a CPU. With TRITON_INTERPRET=0 their tests run on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

# The fixtures import the package, not this file: the process that distributes the tests reads this file too.


# The longest files start first: a long file at the end would keep the other workers waiting.
LONGEST = (
    "tests/training/test_resume.py",
    "tests/training/test_translation.py",
    "tests/training/test_factored_gradients.py",
    "tests/models/test_compile_and_export.py",
    "tests/test_hub.py",
    "tests/test_examples.py",
    "tests/bad_inputs/test_signals.py",
)


def pytest_collection_modifyitems(items):
    """Moves the tests of `LONGEST` to the front; with --no-loadscope-reorder workers take files in this order."""
    items.sort(key=lambda item: item.location[0] not in LONGEST)


@pytest.fixture
def classes_as_before(monkeypatch):
    """Clears the marks of `with_code` on classes for one test, and restores them: all tests share the classes."""
    from moe_hf.families import FAMILIES

    for family in FAMILIES.values():
        for cls in (family.config_class, family.base_class, *family.heads.values()):
            monkeypatch.setattr(cls, "_auto_class", None)


@pytest.fixture
def call_command(capsys):
    """`call_command(name, *arguments)` runs `moe-hf NAME` in this process; returns exit status, output and errors."""

    def call(*arguments):
        from moe_hf import cli

        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def call_script(monkeypatch, capsys):
    """`call_script(name, *arguments)` runs scripts/NAME in this process; returns exit status, output and errors."""

    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / name))["main"]()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
