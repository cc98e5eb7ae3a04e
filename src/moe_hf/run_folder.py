"""A run's folder: the names of its files, and its checkpoints."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers.distributed.checkpoint import is_sharded_checkpoint

from .distributed.sharded_checkpoints import check_sharded_optimizer
from .errors import InputError

# The arguments of a run: a configuration file that repeats it.
CONFIG_FILE = "run.yaml"
# What decides the course of a run, which a resumed run must not change.
RUN_FILE = "run_arguments.json"
# How evenly the experts were used, by step and layer.
HISTORY_FILE = "expert_history.csv"
# The checkpoints that an averaged model is the mean of.
AVERAGED_FILE = "averaged_checkpoints.json"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of that name is a checkpoint of a run."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The folders `checkpoint-N` of a run, by rising N, whole or not."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def check_checkpoint(folder: str | Path) -> None:
    """Check that a training checkpoint is whole.

    The Trainer writes trainer_state.json last, so a run that was killed while saving leaves a folder without it.

    Args:
        folder: the checkpoint.

    Raises:
        InputError: a file is missing or damaged; the message names it.
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
