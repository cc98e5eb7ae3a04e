"""Output folders and checkpoints: refuse to overwrite, find the last whole one, tell a broken one."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import safe_open

from ..errors import InputError

logger = logging.getLogger(__name__)


def prepare_output_dir(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """Check the output folder of a run and find the checkpoint to resume from.

    Args:
        output_dir: folder of the run.
        resume_from_checkpoint: a checkpoint's folder; "last" (or true): the last whole one in `output_dir`, or a
            new start when there is none yet; None (or false): a new run, which needs an empty folder.

    Returns:
        the folder to resume from, or None.

    Raises:
        InputError: the folder of a new run is not empty, or the checkpoint named is not whole.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={output_dir} is a file, expected a folder")
    if resume_from_checkpoint in (None, False):
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"output_dir={output_dir} is not empty: take another folder, or go on with --resume_from_checkpoint"
            )
        return None
    if str(resume_from_checkpoint).lower() not in ("last", "true"):
        check_checkpoint(resume_from_checkpoint)
        return resume_from_checkpoint
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            check_checkpoint(checkpoint)
            return str(checkpoint)
        except InputError as error:
            logger.warning(f"skipped: {error}")
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The folders `checkpoint-N` of a run, by rising N, whole or not."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def check_checkpoint(folder: str | Path) -> None:
    """Raise an InputError, which names the file, unless a training checkpoint is whole.

    The Trainer writes trainer_state.json last, so a run that was killed while saving leaves a folder without it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} does not exist")
    for name in ("trainer_state.json", "config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"checkpoint {folder} is not whole: {name} is missing or broken") from error
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise InputError(f"checkpoint {folder} is not whole: model.safetensors is missing")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except Exception as error:
            raise InputError(f"checkpoint {folder} is broken: {path.name} cannot be read ({error})") from error
    for name in ("optimizer.pt", "scheduler.pt"):  # without them the Trainer would start these two anew, silently
        if not (folder / name).is_file():
            raise InputError(f"checkpoint {folder} is not whole: {name} is missing")
    for path in sorted(folder.glob("*.pt*")):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"checkpoint {folder} is broken: {path.name} cannot be read ({error})") from error
        if damaged:
            raise InputError(f"checkpoint {folder} is broken: {path.name} is damaged in {damaged}")
