"""One thread for every test: the tensors are tiny, and waiting for a second thread can cost more than it saves.

No network either: a name that is not a folder is refused at once, rather than looked for on the Hub.
"""

import os
import runpy
from pathlib import Path

# Before torch and huggingface_hub are imported; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402

# The fixtures import the package: the process that hands the tests to workers reads this file too, and does without.


# The longest files, which begin first: one that is left for the end would keep the other workers waiting.
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
    """Bring the tests of `LONGEST` to the front; with --no-loadscope-reorder workers take files in this order."""
    items.sort(key=lambda item: item.location[0] not in LONGEST)


@pytest.fixture
def classes_as_before(monkeypatch):
    """`with_code` marks classes, which all tests share."""
    from moe_hf.families import FAMILIES

    for family in FAMILIES.values():
        for cls in (family.config_class, family.base_class, *family.heads.values()):
            monkeypatch.setattr(cls, "_auto_class", None)


@pytest.fixture
def call_command(capsys):
    """`call_command(name, *arguments)` runs `moe-hf NAME` in this process: its exit status, output and errors."""

    def call(*arguments):
        from moe_hf import cli

        status = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def call_script(monkeypatch, capsys):
    """`call_script(name, *arguments)` runs scripts/NAME in this process: its exit status, output and errors."""

    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / name))["main"]()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
