"""One thread for every test: the tensors are tiny, and waiting for a second thread can cost more than it saves.

No network either: a name that is not a folder is refused at once, rather than looked for on the Hub.
"""

import os
import runpy
from pathlib import Path

# Before torch, triton and huggingface_hub are imported; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton's kernels run in its interpreter, on a CPU. With TRITON_INTERPRET=0 their tests run on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from moe_hf import (  # noqa: E402
    GnmtMoeConfig,
    GnmtMoeForConditionalGeneration,
    GnmtMoeModel,
    LstmMoeConfig,
    LstmMoeForCausalLM,
    LstmMoeForSequenceClassification,
    LstmMoeModel,
    cli,
)


@pytest.fixture
def classes_as_before(monkeypatch):
    """`with_code` marks classes, which all tests share."""
    for cls in (LstmMoeConfig, LstmMoeModel, LstmMoeForCausalLM, LstmMoeForSequenceClassification):
        monkeypatch.setattr(cls, "_auto_class", None)
    for cls in (GnmtMoeConfig, GnmtMoeModel, GnmtMoeForConditionalGeneration):
        monkeypatch.setattr(cls, "_auto_class", None)


@pytest.fixture
def call_command(capsys):
    """`call_command(name, *arguments)` runs `moe-hf NAME` in this process: its exit status, output and errors."""

    def call(*arguments):
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
