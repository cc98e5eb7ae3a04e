"""The reader refuses what torch.distributed.checkpoint would execute, and reads everything that it writes."""

import copyreg
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from moe_hf.distributed.safe_checkpoint_reader import SafePlanner, SafeReader

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "step": torch.tensor(3),
    "lr": 0.5,
    "betas": (0.9, 0.999),
    "foreach": None,
}


class Calls:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path / "optimizer")
    return tmp_path / "optimizer"


def load(folder):
    state = {name: torch.zeros_like(value) if torch.is_tensor(value) else 0 for name, value in STATE.items()}
    dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    return state


def test_all_that_the_library_writes_is_read(folder):
    loaded = load(folder)
    assert loaded.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(loaded[name], value) if torch.is_tensor(value) else loaded[name] == value
    expected, found = (reader(folder).read_metadata() for reader in (FileSystemReader, SafeReader))
    expected.storage_meta.load_id = found.storage_meta.load_id
    assert found == expected


@pytest.mark.parametrize(
    "planted",
    [
        Calls(os.mkdir, "marker"),
        Calls(eval, "__import__('os').mkdir('marker')"),
        Calls(getattr, "text", "upper"),
        Calls(torch.load, "other"),
        Calls(copyreg._reconstructor, dict, object, None),
        {"a": "map"},
        None,
    ],
    ids=["mkdir", "eval", "getattr", "load", "reconstructor", "map", "none"],
)
def test_metadata_call_nothing(folder, planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(planted))
    with pytest.raises(pickle.UnpicklingError):
        SafeReader(folder).read_metadata()
    with pytest.raises(CheckpointException):
        load(folder)
    assert not (tmp_path / "marker").exists()


def test_a_file_outside_of_the_folder_is_refused(folder):
    metadata = FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../other"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="outside of the folder"):
        SafeReader(folder).read_metadata()


def test_a_value_calls_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save(STATE | {"lr": Calls(os.mkdir, "marker")}, checkpoint_id=folder)
    with pytest.raises(CheckpointException):
        load(folder)
    assert not (tmp_path / "marker").exists()
