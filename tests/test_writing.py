"""Files and folders are written completely or not at all."""

import os
import resource

import datasets
import pytest
import torch
from safetensors.torch import save_file

from moe_hf.errors import InputError
from moe_hf.writing import check_file, check_new_folder, naming, new_folder, whole_file, whole_files, write_file


@pytest.fixture
def full_disk():
    """No file grows beyond 50 bytes."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, unlimited[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("name", ["out", "a/b/out", "link"])
def test_a_folder_is_there_when_it_is_whole(name, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / name, "out") as folder:
        (folder / "file").write_text("text")
        assert not (tmp_path / name / "file").exists()
    assert (tmp_path / name / "file").read_text() == "text" and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", name.partition("/")[0]}
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_an_empty_folder_stays_the_same_one(tmp_path):
    number = tmp_path.stat().st_ino
    with new_folder(tmp_path) as folder:
        (folder / "file").touch()
        (folder / "below").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "below"} and tmp_path.stat().st_ino == number


@pytest.mark.parametrize("error", [KeyError("other"), OSError(28, "full"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(error, tmp_path):
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        with new_folder(tmp_path / "a" / "out") as folder:
            (folder / "file").touch()
            raise error
    assert not list(tmp_path.iterdir())


def test_files_of_a_folder_are_replaced_together(tmp_path):
    for name in ("one", "two", "other"):
        (tmp_path / name).write_text("old")
    with pytest.raises(InputError, match="full"), whole_files(tmp_path, "out") as folder:
        (folder / "one").write_text("new")
        raise OSError("full")
    assert [(tmp_path / name).read_text() for name in ("one", "two", "other")] == ["old"] * 3
    with whole_files(tmp_path, "out") as folder:
        (folder / "one").write_text("new")
        (folder / "two").write_text("new")
    assert [(tmp_path / name).read_text() for name in ("one", "two", "other")] == ["new", "new", "old"]


def test_an_earlier_file_is_kept_when_the_disk_gets_full(tmp_path, full_disk):
    write_file(tmp_path / "file", "short", "output")
    with pytest.raises(InputError, match="output=.*file: cannot be written .File too large"):
        write_file(tmp_path / "file", "long" * 50, "output")
    assert (tmp_path / "file").read_text() == "short" and len(list(tmp_path.iterdir())) == 1


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "folder" / "real.txt")
    write_file(tmp_path / "link.txt", "text\r\n", "output")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "folder" / "real.txt").read_bytes() == b"text\r\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "text", "output")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_a_file_keeps_its_ending(tmp_path):
    with whole_file(tmp_path / "plot.png", "output") as file:
        assert file.name == "plot.png" and file.parent != tmp_path
        file.touch()


def test_looking_leaves_nothing(tmp_path):
    check_file(tmp_path / "file", "output")
    check_new_folder(tmp_path / "a" / "b", "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["torch", "safetensors", "tokenizers", "datasets"])
def test_what_libraries_raise_on_a_full_disk_is_one_reason(library, tmp_path, full_disk):
    from tokenizers import Tokenizer, models

    def write():
        if library == "torch":
            torch.save(torch.ones(1000), tmp_path / "file")
        elif library == "safetensors":
            save_file({"weights": torch.ones(1000)}, tmp_path / "file")
        elif library == "tokenizers":
            Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "file"))
        else:
            rows = datasets.Dataset.from_dict({"text": ["a"] * 1000})
            rows.map(lambda row: row, cache_file_name=str(tmp_path / "file.arrow"))

    with pytest.raises(InputError) as caught, naming("out", "folder", "file"):
        write()
    reason = "a write failed, the disk may be full" if library == "torch" else "File too large"
    assert str(caught.value) == f"out=folder: file cannot be written ({reason})"


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="other"), naming("out", "folder"):
        raise RuntimeError("other")
    with pytest.raises(BrokenPipeError), naming("out", "folder"):
        raise BrokenPipeError
