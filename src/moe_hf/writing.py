"""Writes files and folders completely or not at all, with errors that name what cannot be written.

Everything is written into a folder `.unfinished-...` beside the target, and moved there when it is complete.
"""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from .errors import InputError, first_line

UNFINISHED = ".unfinished-"
# Messages of torch.save and the tokenizers library, whose errors do not have a specific class.
TORCH_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
WRITE_ERRORS = (*TORCH_ERRORS, "cannot be opened", "(os error ")
# Errors of `datasets` that hide the cause.
WRAPPERS = ("DatasetGenerationError",)


@contextmanager
def naming(argument: str, path: str | Path, what: str = "", advice: str = "") -> Iterator[None]:
    """Turn an error of writing into one line that names the argument.

    Args:
        argument: the name of the argument that `path` was given for.
        path: the path as the user gave it.
        what: the file that is written, if it is not `path` itself.
        advice: advice to append.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        yield
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        what = f"{what} " if what else ""
        raise InputError(f"{argument}={_shown(path)}: {what}cannot be written ({reason}){advice}") from error


def reason_of(error: BaseException) -> str | None:
    """Return why a file could not be written, or None if `error` has another cause."""
    text = str(error)
    if type(error) is ValueError and "null byte" in text:
        return text
    is_of_writing = isinstance(error, OSError | SafetensorError) or any(name in text for name in WRITE_ERRORS)
    is_of_writing = is_of_writing and not isinstance(error, InputError | BrokenPipeError | HTTPError)
    if not (is_of_writing or type(error).__name__ in WRAPPERS):
        return None
    cause = error
    while cause is not None:  # errno is the clearest reason
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        if match := re.search(r"os error (\d+)", str(cause)):
            return os.strerror(int(match[1]))
        cause = cause.__cause__ or cause.__context__
    if any(name in text for name in TORCH_ERRORS):
        return "a write failed, the disk may be full"
    return first_line(error) if is_of_writing else None


def check_new_folder(folder: str | Path, argument: str = "folder") -> Path:
    """Check that a folder is new or empty, and can be written. Call it before work that could be lost.

    Args:
        folder: the folder; missing parents are created.
        argument: the argument's name in error messages.

    Returns:
        The folder.

    Raises:
        InputError: the folder is not empty, is a file, or cannot be written.
    """
    path = _path(folder, argument)
    with naming(argument, folder):
        if path.exists() and (not path.is_dir() or any(not _is_left_over(file) for file in path.iterdir())):
            raise InputError(f"{argument}={_shown(folder)} must be new or empty")
    check_folder(folder, argument)
    return path


def check_folder(folder: str | Path, argument: str) -> None:
    """Check that a folder, or a new one of that name, can be written.

    Args:
        folder: the folder; parents need not exist.
        argument: the argument's name in error messages.

    Raises:
        InputError: the folder cannot be written.
    """
    path = _path(folder, argument)
    with naming(argument, folder), _unfinished(path) as inside:
        (inside / "file").touch()


@contextmanager
def new_folder(folder: str | Path, argument: str = "folder") -> Iterator[Path]:
    """Write a new or empty folder: all files appear at the end, or none after an error.

    Args:
        folder: as for `check_new_folder`, which is called first.
        argument: the argument's name in error messages.

    Yields:
        The folder to write into, with the same name.

    Raises:
        InputError: `folder` is not empty, or cannot be written.
    """
    path = check_new_folder(folder, argument)
    with whole_files(path, argument) as inside:
        yield inside


@contextmanager
def whole_files(folder: str | Path, argument: str, advice: str = "") -> Iterator[Path]:
    """Write files into a folder that may have other files: all files appear at the end, or none after an error.

    Args:
        folder: the folder; created if missing.
        argument: the argument's name in error messages.
        advice: advice to append to an error message.

    Yields:
        The folder to write into.

    Raises:
        InputError: a file cannot be written.
    """
    with naming(argument, folder, advice=advice), _unfinished(_path(folder, argument), keep=True) as inside:
        yield inside


def check_not_input(file: str | Path, argument: str, inputs: dict[str, str]) -> None:
    """Check that an output file would not overwrite an input.

    Args:
        file: the output file.
        argument: the argument's name in error messages.
        inputs: {argument: a file, or a folder with files}.

    Raises:
        InputError: `file` is one of the inputs.
    """
    there = Path(file).resolve()
    for name, given in inputs.items():
        source = Path(given).resolve()
        if there.is_file() and (there.samefile(source) if source.is_file() else there.parent == source):
            raise InputError(f"{argument}={_shown(file)} would overwrite {name}={_shown(given)}: take another file")


def check_file(file: str | Path, argument: str) -> Path:
    """Check that a file can be written. Call it before work that could be lost.

    Args:
        file: the file, in a folder that exists.
        argument: the argument's name in error messages.

    Returns:
        The file.

    Raises:
        InputError: `file` is a folder, its folder does not exist, or it cannot be written.
    """
    path = _path(file, argument)
    with naming(argument, file):
        if path.is_dir():
            raise InputError(f"{argument}={_shown(file)} is a folder, expected a file")
        if not path.parent.is_dir():
            raise InputError(f"{argument}={_shown(file)}: there is no folder {path.parent}")
        if not _is_device(path):
            with _unfinished(path.resolve().parent) as inside:
                (inside / path.resolve().name).touch()
    return path


@contextmanager
def whole_file(file: str | Path, argument: str) -> Iterator[Path]:
    """Write a file: an existing file of that name does not change until the new file is complete.

    Args:
        file: the file, in a folder that exists. A device, such as /dev/stdout, is written directly.
        argument: the argument's name in error messages.

    Yields:
        The file to write, with the same suffix.

    Raises:
        InputError: the file cannot be written.
    """
    path = check_file(file, argument)
    with naming(argument, file):
        if _is_device(path):
            yield path
        else:
            with _unfinished(path.resolve().parent, keep=True) as inside:
                yield inside / path.resolve().name


def write_file(file: str | Path, text: str, argument: str) -> None:
    """Write text with `whole_file`, in UTF-8 and with unchanged line breaks.

    Args:
        file: the file to write.
        text: the content.
        argument: the argument's name in error messages.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(file, argument) as path:
        path.write_text(text, encoding="utf-8", newline="")


def _shown(path: str | Path) -> str:
    """Return a path on one line; refuse an empty one."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _path(path: str | Path, argument: str) -> Path:
    if not str(path):
        raise InputError(f"{argument}='' is empty, a path is needed")
    return Path(path)


def _is_device(path: Path) -> bool:
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


def _is_left_over(path: Path) -> bool:
    """Return whether a folder was left by a command that was killed while writing."""
    return path.name.startswith(UNFINISHED)


@contextmanager
def _unfinished(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary folder on the same disk as `folder`; at the end, move its content to `folder` if `keep`."""
    folder = Path(os.path.realpath(folder, strict=os.path.islink(folder)))
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    outer = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=there))
    try:
        inner = outer / folder.relative_to(there)
        inner.mkdir(parents=True, exist_ok=True)
        yield inner
        for whole in sorted(outer.iterdir()) if keep else ():
            os.replace(whole, there / whole.name)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
