"""An output folder accepts one run at a time; a killed process does not keep the lock."""

import errno
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
from filelock import FileLock
from processes import errors_of_processes, on_processes
from tiny_training import tiny_arguments

from moe_hf.errors import InputError
from moe_hf.run_folder import LOCK_FILE
from moe_hf.training.checkpoints import prepare_output_dir
from moe_hf.training.run_lock import run_lock


def arguments(folder):
    return SimpleNamespace(output_dir=str(folder), process_index=0, world_size=1)


def hold(folder, connection):
    with run_lock(arguments(folder)):
        connection.send("held")
        connection.recv()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_until_the_first_is_killed(holder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=f"output_dir={folder} is used by process {holder.pid} on "):
        with run_lock(arguments(folder)):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    assert prepare_output_dir(str(folder), None) is None  # a leftover lock is not a run
    with run_lock(arguments(folder)):
        pass
    assert not (folder / LOCK_FILE).exists()


def test_the_same_process_cannot_run_twice_at_once(tmp_path):
    with run_lock(arguments(tmp_path)):
        with pytest.raises(InputError, match=f"is used by process {os.getpid()}"):
            with run_lock(arguments(tmp_path)):
                pass
        assert (tmp_path / LOCK_FILE).exists()


def run_as_one_of_two(folder):
    with run_lock(tiny_arguments(folder)):
        pass


@pytest.mark.distributed
def test_every_process_of_a_second_run_is_refused(tmp_path):
    on_processes(2, run_as_one_of_two, tmp_path)
    with run_lock(arguments(tmp_path)):
        for error in errors_of_processes(2, run_as_one_of_two, tmp_path):
            assert error.startswith(f"InputError: output_dir={tmp_path} is used by process {os.getpid()}")


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(arguments(tmp_path / "run")):
        1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_told(error, tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with run_lock(arguments(tmp_path)):
        assert f"output_dir={tmp_path} has no locks" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [("file", "is a file"), ("file/run", "cannot be written"), ("/proc/run", "cannot be written")]
)
def test_a_folder_that_cannot_be_written_is_named(name, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"output_dir={tmp_path / name} {message}"):
        with run_lock(arguments(tmp_path / name)):
            pass
