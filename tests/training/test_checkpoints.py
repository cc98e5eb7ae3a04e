"""Output folders are never overwritten; the last complete checkpoint is found, and an error names a broken one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import ArrayStream, noiseless_lm, tiny_arguments, tiny_trainer
from transformers import PreTrainedModel, Trainer, TrainerState

from moe_hf import checksums
from moe_hf.checksums import CHECKSUM_FILE
from moe_hf.data.windows import StreamWindows, collate_windows
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
    tiny_trainer(noiseless_lm(torch.float32), windows, folder, carry_state=True, **arguments).train()
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


@pytest.mark.parametrize("named", [True, False])
def test_a_resumed_run_logs_its_checkpoint_and_step_in_one_line(run_folder, named, caplog):
    checkpoint = run_folder / "checkpoint-10"  # a copy of the checkpoint of step 1
    with caplog.at_level("INFO"):
        prepare_output_dir(str(run_folder), str(checkpoint) if named else "last")
    assert caplog.messages == [f"resumes from {checkpoint}, after step 1"]


def test_last_starts_anew_when_there_is_no_checkpoint(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert prepare_output_dir(str(tmp_path / "new"), "last") is None
    assert "new has no checkpoint: the run begins at step 0" in caplog.text


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


def trainer_of(folder, steps, model=None):
    arguments = dict(max_steps=steps, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    windows = StreamWindows(ArrayStream(41), 5, 2)
    model = noiseless_lm(torch.float32) if model is None else model
    return tiny_trainer(model, windows, folder, carry_state=True, optim="adamw_torch", **arguments)


class Killed(BaseException):
    pass


def cut(write, file_of):
    """Returns a `write` that writes half of the file and then kills the process."""

    def killed(*args, **kwargs):
        write(*args, **kwargs)
        truncate(Path(file_of(*args)))
        raise Killed

    return killed


def kill_before(*_, **__):
    raise Killed


MOMENTS = {
    "before the weights": (PreTrainedModel, "save_pretrained", kill_before),
    "in the weights": (
        PreTrainedModel,
        "save_pretrained",
        cut(PreTrainedModel.save_pretrained, lambda model, folder, *_: Path(folder, "model.safetensors")),
    ),
    "in a state": (torch, "save", cut(torch.save, lambda state, file: file)),
    "before the random state": (Trainer, "_save_rng_state", kill_before),
    "before trainer_state.json": (TrainerState, "save_to_json", kill_before),
    "in trainer_state.json": (TrainerState, "save_to_json", cut(TrainerState.save_to_json, lambda state, file: file)),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two_steps")
    trainer_of(folder, steps=2).train()
    return folder


@pytest.mark.parametrize("is_there_already", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(
    two_steps, tmp_path, monkeypatch, moment, is_there_already
):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    if not is_there_already:
        shutil.rmtree(tmp_path / "checkpoint-2")
    place, name, killed = MOMENTS[moment]
    monkeypatch.setattr(place, name, killed)
    with pytest.raises(Killed):
        trainer_of(tmp_path, steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert prepare_output_dir(str(tmp_path), "last") == str(tmp_path / "checkpoint-1")


def test_a_run_killed_before_its_checksums_has_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_sha256", kill_before)
    with pytest.raises(Killed):
        trainer_of(tmp_path, steps=1).train()
    assert prepare_output_dir(str(tmp_path), "last") == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / CHECKSUM_FILE).exists()


def test_checksums_are_of_all_files_and_written_once_more_over_a_broken_checkpoint(tmp_path):
    trainer_of(tmp_path, steps=2).train()
    (tmp_path / "checkpoint-2" / "of_the_broken_one.pt").write_bytes(b"")
    flip_a_byte(tmp_path / "checkpoint-2" / "model.safetensors")
    trainer_of(tmp_path, steps=2).train(resume_from_checkpoint=prepare_output_dir(str(tmp_path), "last"))
    check_checkpoint(tmp_path / "checkpoint-2")
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert json.loads((tmp_path / "checkpoint-2" / CHECKSUM_FILE).read_text()).keys() == files - {CHECKSUM_FILE}
    assert "of_the_broken_one.pt" not in files


def test_a_checkpoint_of_the_plain_trainer_is_resumed(tmp_path):
    saving = dict(save_strategy="steps", save_steps=1, optim="adamw_torch")
    arguments = tiny_arguments(tmp_path / "plain", max_steps=1, **saving)
    windows = StreamWindows(ArrayStream(41), 5)
    options = dict(args=arguments, train_dataset=windows, data_collator=collate_windows)
    Trainer(model=noiseless_lm(torch.float32), **options).train()
    checkpoint = prepare_output_dir(str(tmp_path / "ours"), str(tmp_path / "plain" / "checkpoint-1"))
    assert not (Path(checkpoint) / CHECKSUM_FILE).exists()
    ours = tiny_trainer(
        noiseless_lm(torch.float32, seed=1), windows, tmp_path / "ours", max_steps=2, optim="adamw_torch"
    )
    ours.train(resume_from_checkpoint=checkpoint)
    assert ours.state.global_step == 2


def test_weights_of_another_model_are_refused_and_not_left_out(tmp_path):
    trainer_of(tmp_path, steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    deeper = noiseless_lm(torch.float32, layer_pattern=["lstm", "moe", "lstm", "lstm"])
    with pytest.raises(InputError, match=r"checkpoint-1: the weights lack .*layers\.3"):
        trainer_of(tmp_path, steps=2, model=deeper).train(resume_from_checkpoint=checkpoint)
    shallower = noiseless_lm(torch.float32, layer_pattern=["lstm", "moe"])
    with pytest.raises(InputError, match=r"checkpoint-1: the weights have .*layers\.2"):
        trainer_of(tmp_path, steps=2, model=shallower).train(resume_from_checkpoint=checkpoint)


def test_tied_weights_are_not_missing(tmp_path):
    tied = dict(tie_word_embeddings=True)
    trainer_of(tmp_path, steps=1, model=noiseless_lm(torch.float32, **tied)).train()
    trainer = trainer_of(tmp_path, steps=2, model=noiseless_lm(torch.float32, seed=1, **tied))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_a_weight_file_that_the_index_names_is_needed(real_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(real_checkpoint, tmp_path / "checkpoint-1"))
    (checkpoint / CHECKSUM_FILE).unlink()
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is incomplete: model-00002-of-00002.safetensors is missing"):
        check_checkpoint(checkpoint)


def test_another_number_of_processes_has_other_random_numbers(tmp_path, caplog):
    trainer_of(tmp_path, steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_0.pth")
    trainer_of(tmp_path, steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert "was saved by 2 processes, now there are 1" in caplog.text
