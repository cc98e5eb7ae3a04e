"""Output folders and checkpoints: refuse to overwrite, find the last whole one, tell a broken or a foreign one."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers.distributed.checkpoint import is_sharded_checkpoint

from ..distributed.sharded_checkpoints import check_sharded_optimizer
from ..errors import InputError

logger = logging.getLogger(__name__)
RUN_FILE = "run_arguments.json"


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
    is_sharded = is_sharded_checkpoint(folder)
    weights = sorted(folder.glob("shard-*.safetensors" if is_sharded else "model*.safetensors"))
    if not weights:
        raise InputError(f"checkpoint {folder} is not whole: model.safetensors is missing")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except Exception as error:
            raise InputError(f"checkpoint {folder} is broken: {path.name} cannot be read ({error})") from error
    if is_sharded:
        check_sharded_optimizer(folder)
        num_processes = len(list(folder.glob("rng_state*.pth")))
        if len(weights) != num_processes:
            raise InputError(f"checkpoint {folder} is not whole: {len(weights)} shards of {num_processes} processes")
    # Without them the Trainer would start these two anew, silently.
    for name in ("scheduler.pt",) if is_sharded else ("optimizer.pt", "scheduler.pt"):
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


def check_same_run(output_dir: str, checkpoint: str | None, arguments: dict) -> None:
    """Keep the arguments of a new run in its folder; those of a resumed run must be the same.

    Args:
        output_dir: folder of the run.
        checkpoint: what is resumed from, None for a new run.
        arguments: what decides the course of the run, as plain values.

    Raises:
        InputError: an argument differs from the run that the checkpoint belongs to; names it and both values.
    """
    arguments = json.loads(json.dumps(arguments, default=str))
    if checkpoint is None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / RUN_FILE).write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
        return
    file = Path(checkpoint).parent / RUN_FILE
    if not file.is_file():
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    for name, value in arguments.items():
        if name in earlier and earlier[name] != value:
            raise InputError(
                f"{name}={value!r} differs from {name}={earlier[name]!r} of the run to be resumed ({file}); give the "
                "same, or start a new run with --model_name_or_path"
            )
