"""Reads a checkpoint's files other than weights and tokenizer, without executing anything in them."""

import pickle
import zipfile
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from . import model_files
from .errors import InputError, first_line

# Keys that the Trainer needs in each state file, by the start of the file's name.
NEEDED = {
    "optimizer.": ("state", "param_groups"),
    "scheduler.": ("last_epoch",),
    "rng_state": ("python", "numpy", "cpu"),
}


def read_map(file: Path) -> dict:
    """Read a JSON file that holds a map.

    Raises:
        InputError: the file is missing or damaged; the message names the checkpoint's folder and the file.
    """
    if not file.exists():
        raise InputError(f"checkpoint {file.parent} is incomplete: {file.name} is missing")
    try:
        return model_files.read_map(file)
    except ValueError as error:
        raise InputError(f"checkpoint {file.parent} is incomplete: {error}") from error


def check_trainer_state(file: Path) -> None:
    """Check that the Trainer can resume from its state file.

    Raises:
        InputError: the file is damaged.
    """
    content = read_map(file)
    try:
        state = TrainerState(**content)
    except TypeError as error:
        raise InputError(f"checkpoint {file.parent} is broken: {file.name}: {first_line(error)}") from error
    kinds = {"global_step": int, "max_steps": int, "epoch": (int, float), "log_history": list}
    kinds |= {"total_flos": (int, float), "stateful_callbacks": dict}
    for name, kind in kinds.items():
        if name not in content or not isinstance(getattr(state, name), kind):
            found = content.get(name, "missing")
            raise InputError(f"checkpoint {file.parent} is broken: {file.name} has {name}={str(found)[:80]}")


def check_tensors(file: Path, is_verified: bool) -> None:
    """Check a file that `torch.save` wrote, which may hold only tensors and plain values.

    Args:
        file: a file in the checkpoint's folder.
        is_verified: whether the file's checksum was checked, which proves that the file is as it was saved.

    Raises:
        InputError: the file is damaged, or holds other objects. They are never executed.
    """
    where = f"checkpoint {file.parent} is broken: {file.name}"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = None if is_verified else archive.testzip()
    except Exception as error:  # BadZipFile, and errors from damaged names and sizes
        raise InputError(f"{where} cannot be read ({first_line(error)})") from error
    if damaged:
        raise InputError(f"{where} is damaged in {damaged}")
    try:
        with safe_globals():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{where} holds more than tensors and plain values, so it is not read") from error
    except Exception as error:
        raise InputError(f"{where} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} holds a {type(content).__name__}, not a map")
    for start, names in NEEDED.items():
        missing = [name for name in names if file.name.startswith(start) and name not in content]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}")
