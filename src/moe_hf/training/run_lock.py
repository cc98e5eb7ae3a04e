"""A lock that allows one run at a time in an output folder; the system releases it if the process dies."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from ..distributed.waiting import broadcast_from_rank_zero
from ..errors import InputError
from ..run_folder import LOCK_FILE
from ..writing import naming

logger = logging.getLogger(__name__)

# Error numbers of file systems without locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def run_lock(training_args: TrainingArguments) -> Iterator[None]:
    """Create `output_dir`, and hold its lock in the first process of a run.

    A file system without locks causes a warning, and the folder is used without a lock.

    Args:
        training_args: the training arguments.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written; raised on every process.
    """
    folder = Path(training_args.output_dir)
    with naming("output_dir", folder):  # for a name that is too long
        is_new = not folder.exists()
    lock = None
    if training_args.process_index == 0:
        lock = FileLock(folder / LOCK_FILE, timeout=0)
    broadcast_from_rank_zero(lambda: _acquire(lock, folder), training_args)
    try:
        yield
    finally:
        if lock is not None and lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # before another run can lock it
            lock.release()
            if is_new:
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    file = Path(lock.lock_file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        lock.acquire()
    except Timeout as error:
        by = f" by {holder}" if holder else ""
        raise InputError(f"output_dir={folder} is used{by} at this moment: use another folder, or wait") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in WITHOUT_LOCKS:
            logger.warning(f"output_dir={folder} has no locks ({error}): make sure that no other run writes there")
        elif folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir={folder} is a file, expected a folder") from error
        else:
            raise InputError(f"output_dir={folder} cannot be written ({error.strerror})") from error
    else:
        with suppress(OSError):  # the text is only for the error message
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
