"""Output folders are not overwritten; the last whole checkpoint is found, a broken one is named."""

import json
import shutil

import pytest
import torch
from tiny_lm import ArrayStream, tiny_model, tiny_trainer

from moe_hf.data.windows import StreamWindows
from moe_hf.errors import InputError
from moe_hf.run_folder import check_checkpoint, list_checkpoints
from moe_hf.training.checkpoints import prepare_output_dir


@pytest.fixture(scope="module")
def real_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = dict(
        max_steps=1, save_strategy="steps", save_steps=1, per_device_train_batch_size=2, optim="adamw_torch"
    )
    windows = StreamWindows(ArrayStream(41), 5, 2)
    tiny_trainer(tiny_model(torch.float32), windows, folder, carry_state=True, **arguments).train()
    return folder / "checkpoint-1"


@pytest.fixture
def run_folder(tmp_path, real_checkpoint):
    """A run with checkpoints of steps 8, 9 and 10."""
    for step in (8, 9, 10):
        shutil.copytree(real_checkpoint, tmp_path / f"checkpoint-{step}")
    return tmp_path


def truncate(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGES = {
    "no trainer_state.json": ("trainer_state.json", lambda path: path.unlink()),
    "trainer_state.json truncated": ("trainer_state.json", truncate),
    "no config.json": ("config.json", lambda path: path.unlink()),
    "broken config.json": ("config.json", lambda path: path.write_text("{'a'")),
    "binary config.json": ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "no model.safetensors": ("model.safetensors", lambda path: path.unlink()),
    "model.safetensors truncated": ("model.safetensors", truncate),
    "model.safetensors empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "no optimizer.pt": ("optimizer.pt", lambda path: path.unlink()),
    "optimizer.pt truncated": ("optimizer.pt", truncate),
    "optimizer.pt damaged": ("optimizer.pt", flip_a_byte),
    "no scheduler.pt": ("scheduler.pt", lambda path: path.unlink()),
    "scheduler.pt empty": ("scheduler.pt", lambda path: path.write_bytes(b"")),
    "rng_state.pth truncated": ("rng_state.pth", truncate),
    "carried_state_0.pt truncated": ("carried_state_0.pt", truncate),
}


def test_whole_checkpoint_passes(real_checkpoint):
    check_checkpoint(real_checkpoint)
    assert prepare_output_dir(str(real_checkpoint.parent), str(real_checkpoint)) == str(real_checkpoint)


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoint_is_refused_and_its_file_named(run_folder, damage):
    name, break_it = DAMAGES[damage]
    checkpoint = run_folder / "checkpoint-10"
    break_it(checkpoint / name)
    with pytest.raises(InputError, match=f"checkpoint {checkpoint} is .*{name}") as caught:
        prepare_output_dir(str(run_folder), str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoint_is_skipped_with_a_warning_for_the_one_before(run_folder, damage, caplog):
    name, break_it = DAMAGES[damage]
    break_it(run_folder / "checkpoint-10" / name)
    assert prepare_output_dir(str(run_folder), "last") == str(run_folder / "checkpoint-9")
    assert "checkpoint-10" in caplog.text and name in caplog.text


def test_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match="checkpoint .*checkpoint-7 does not exist"):
        prepare_output_dir(str(tmp_path), str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize("last", ["last", "true", "True", True])
def test_last_checkpoint_is_that_of_the_highest_step(run_folder, last):
    assert [path.name for path in list_checkpoints(run_folder)] == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]
    assert prepare_output_dir(str(run_folder), last) == str(run_folder / "checkpoint-10")


def test_other_names_are_no_checkpoints(run_folder):
    (run_folder / "checkpoint-99").write_text("a file")
    (run_folder / "checkpoint-11-old").mkdir()
    (run_folder / "checkpoint-").mkdir()
    assert prepare_output_dir(str(run_folder), "last") == str(run_folder / "checkpoint-10")


def test_last_starts_anew_when_there_is_no_checkpoint(tmp_path):
    assert prepare_output_dir(str(tmp_path / "new"), "last") is None


@pytest.mark.parametrize("resume", [None, False])
def test_new_run_needs_an_empty_folder(tmp_path, resume):
    assert prepare_output_dir(str(tmp_path / "new"), resume) is None
    assert prepare_output_dir(str(tmp_path), resume) is None
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match=f"output_dir={tmp_path} is not empty.*--resume_from_checkpoint"):
        prepare_output_dir(str(tmp_path), resume)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("resume", [None, "last"])
def test_file_in_place_of_the_folder_is_refused(tmp_path, resume):
    path = tmp_path / "run"
    path.write_text(json.dumps({}))
    with pytest.raises(InputError, match=f"output_dir={path} is a file"):
        prepare_output_dir(str(path), resume)
