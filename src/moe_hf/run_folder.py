"""A run's folder: its file names and its checkpoints."""

import re
from pathlib import Path

from safetensors import safe_open
from transformers.distributed.checkpoint import is_sharded_checkpoint

from . import model_files
from .checkpoint_files import check_tensors, check_trainer_state, read_map
from .checksums import CHECKSUM_FILE, check_checksums
from .data.tokenizers import load_tokenizer
from .distributed.sharded_checkpoints import check_sharded_optimizer
from .errors import InputError
from .model_files import MODEL_FILES, TOKENIZER_FILES
from .old_names import with_new_names

# The arguments of a run, as a configuration file that repeats the run.
CONFIG_FILE = "run.yaml"
# The arguments that a resumed run must not change.
RUN_FILE = "run_arguments.json"
WITHOUT_RUN_FILE = "restore it, or delete it to resume without a check of the arguments"
# The lock of the run that writes into the folder.
LOCK_FILE = "run.lock"
# The balance of the experts, by step and layer.
HISTORY_FILE = "expert_history.csv"
# The checkpoints that were averaged into the model.
AVERAGED_FILE = "averaged_checkpoints.json"


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder of that name is a checkpoint of a run."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def list_checkpoints(output_dir: str) -> list[Path]:
    """Return the `checkpoint-N` folders of a run in order of N, including incomplete ones."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def read_run_arguments(folder: str | Path) -> dict | None:
    """Read the arguments that a resumed run must not change from the run's folder.

    Args:
        folder: the run's folder.

    Returns:
        {name: value} with the current names; None if the file does not exist.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(folder) / RUN_FILE
    if not file.exists():
        return None
    try:
        return with_new_names(model_files.read_map(file))
    except ValueError as error:
        raise InputError(f"{file.parent}: {error}: {WITHOUT_RUN_FILE}") from error


def check_checkpoint(folder: str | Path, carries_state: bool = False, *, is_resumed: bool = True) -> None:
    """Check that a training checkpoint is complete, and that reading it cannot execute code.

    The Trainer writes trainer_state.json after everything except the checksums. A run that was killed while saving
    therefore leaves a folder without this file.

    Args:
        folder: the checkpoint.
        carries_state: whether the run has carry_state, so that the checkpoint must have that state.
        is_resumed: whether a run resumes from it, so that it must have the states of optimizer and schedule.

    Raises:
        InputError: a file is missing or damaged; the message names it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"checkpoint {folder} is a file, not a folder")
    if not folder.is_dir():
        there = ", ".join(path.name for path in list_checkpoints(str(folder.parent)))
        raise InputError(f"checkpoint {folder} does not exist" + (f", {folder.parent} has {there}" if there else ""))
    for name in ("trainer_state.json", "config.json"):
        read_map(folder / name)
    is_verified = check_checksums(folder)
    for name in (*MODEL_FILES, *TOKENIZER_FILES):
        if (folder / name).exists():
            read_map(folder / name)
    check_trainer_state(folder / "trainer_state.json")
    num_processes = _check_states(folder, carries_state, is_verified) if is_resumed else 1
    _check_weights(folder, num_processes)
    if not is_verified and list(folder.glob("tokenizer*")):
        _check_tokenizer(folder)


def was_saved(checkpoint: Path) -> bool:
    """Return whether a checkpoint was once complete.

    A run that is killed while saving does not write the checksums, and leaves trainer_state.json missing or empty.
    """
    state = checkpoint / "trainer_state.json"
    return (checkpoint / CHECKSUM_FILE).exists() or (state.exists() and state.stat().st_size > 0)


def _check_states(folder: Path, carries_state: bool, is_verified: bool) -> int:
    """Check optimizer, schedule, random and carried states, which the Trainer would silently reset.

    Returns:
        the number of processes that saved the checkpoint.
    """
    is_sharded = is_sharded_checkpoint(folder)
    needed = ["scheduler.pt"] if is_sharded else ["optimizer.pt", "scheduler.pt"]
    ranks = range(len(list(folder.glob("rng_state_*.pth"))))
    needed += [f"rng_state_{rank}.pth" for rank in ranks] or ["rng_state.pth"]
    if carries_state:
        needed += [f"carried_state_{rank}.pt" for rank in ranks or [0]]
    for name in needed:
        if not (folder / name).is_file():
            raise InputError(f"checkpoint {folder} is incomplete: {name} is missing")
    for file in sorted(folder.glob("*.pt*")):
        check_tensors(file, is_verified)
    if is_sharded:
        check_sharded_optimizer(folder)
    return len(ranks) or 1


def _check_weights(folder: Path, num_processes: int) -> None:
    is_sharded = is_sharded_checkpoint(folder)
    weights = sorted(folder.glob("shard-*.safetensors" if is_sharded else "model*.safetensors"))
    if not weights:
        raise InputError(f"checkpoint {folder} is incomplete: model.safetensors is missing")
    index = folder / "model.safetensors.index.json"  # for a model of several files
    parts = read_map(index).get("weight_map", {}).values() if index.is_file() else ()
    for name in sorted(set(map(str, parts)) - {path.name for path in weights}):
        raise InputError(f"checkpoint {folder} is incomplete: {name} is missing")
    if is_sharded and len(weights) != num_processes:
        raise InputError(f"checkpoint {folder} is incomplete: {len(weights)} shards of {num_processes} processes")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except Exception as error:
            raise InputError(f"checkpoint {folder} is broken: {path.name} cannot be read ({error})") from error


def _check_tokenizer(folder: Path) -> None:
    try:
        load_tokenizer(str(folder), argument="checkpoint")
    except InputError as error:
        raise InputError(
            f"checkpoint {folder} is broken: no tokenizer in tokenizer.json and tokenizer_config.json ({error})"
        ) from error
