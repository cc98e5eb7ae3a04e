"""Finds the checkpoint to resume from; refuses to overwrite a run, or to resume from another run's checkpoint."""

import json
import logging
from pathlib import Path

from ..checkpoint_files import read_map
from ..errors import InputError
from ..run_folder import (
    CONFIG_FILE,
    LOCK_FILE,
    RUN_FILE,
    check_checkpoint,
    list_checkpoints,
    read_run_arguments,
    was_saved,
)
from ..writing import UNFINISHED, check_folder, naming, whole_files

logger = logging.getLogger(__name__)


def prepare_output_dir(
    output_dir: str,
    resume_from_checkpoint: str | bool | None,
    arguments: dict | None = None,
    model_type: str | None = None,
) -> str | None:
    """Check the output folder of a run and find the checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: a checkpoint's folder. "last" (or true) means the last complete checkpoint in
            `output_dir`, or a new start if the run was killed before it saved one. None (or false) means a new run,
            which needs an empty folder.
        arguments: the `run_identity`, which must equal that of the checkpoint's run; None: not checked.
        model_type: the model type of the family; None: not checked.

    Returns:
        the folder to resume from, or None.

    Raises:
        InputError: the folder of a new run is not empty, the checkpoint is incomplete or belongs to another run, or no
            checkpoint is complete.
    """
    folder = Path(output_dir)
    with naming("output_dir", output_dir):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir={output_dir} is a file, expected a folder")
    check_folder(output_dir, "output_dir")
    if resume_from_checkpoint in (None, False):
        if _is_used(folder):
            raise InputError(
                f"output_dir={output_dir} is not empty: use another folder, or resume with --resume_from_checkpoint"
            )
        return None
    if str(resume_from_checkpoint).lower() in ("last", "true"):
        checkpoint = _last_whole_checkpoint(folder)
    else:
        checkpoint = _named_checkpoint(folder, str(resume_from_checkpoint))
    if checkpoint is None:
        logger.info(f"{output_dir} has no checkpoint: the run begins at step 0")
        return None
    _check_family(checkpoint, model_type)
    check_same_run(output_dir, str(checkpoint), arguments or {})
    step = read_map(checkpoint / "trainer_state.json")["global_step"]
    logger.info(f"resumes from {checkpoint}, after step {step}")
    return str(checkpoint)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    checkpoints = list_checkpoints(str(folder))
    carries_state = _carries_state(folder)
    faults = []
    for checkpoint in reversed(checkpoints):
        try:
            check_checkpoint(checkpoint, carries_state)
        except InputError as error:
            faults.append(str(error))
            logger.warning(f"skipped: {error}")
        else:
            if faults:
                logger.warning(f"resumes from {checkpoint}, the last complete checkpoint")
            return checkpoint
    if any(map(was_saved, checkpoints)):
        raise InputError(
            f"output_dir={folder} has no complete checkpoint to resume from ({faults[0]}): delete its checkpoints to "
            "start again, or use another folder"
        )
    if weights := sorted(folder.glob("*.safetensors")):
        raise InputError(
            f"output_dir={folder} has a model, {weights[0].name}, but no checkpoint to resume from: use another "
            "folder, or fine-tune the model with --model_name_or_path"
        )
    if _is_used(folder) or (folder / RUN_FILE).exists():
        logger.warning(f"output_dir={folder} has no complete checkpoint yet: the run starts again")
    return None


def _named_checkpoint(folder: Path, name: str) -> Path:
    checkpoint, argument = Path(name), f"resume_from_checkpoint={name}"
    if not name.strip():
        raise InputError(f"{argument} is empty: name a checkpoint-N folder, or `last`")
    if not checkpoint.exists() and (folder / name).is_dir():
        raise InputError(f"{argument} does not exist: name {folder / name}, or `last`")
    if inside := list_checkpoints(name):
        raise InputError(f"{argument} is the folder of a run: name {inside[-1]}, or `last` with output_dir={name}")
    try:
        check_checkpoint(checkpoint, _carries_state(checkpoint.parent))
    except InputError as error:
        raise InputError(f"{argument}: {error}; `last` means the last complete checkpoint of output_dir") from error
    if _is_used(folder) and checkpoint.resolve().parent != folder.resolve():
        raise InputError(
            f"output_dir={folder} is not empty, and {argument} belongs to another run: use another folder, or resume "
            "with `--resume_from_checkpoint last`"
        )
    return checkpoint


def _is_used(folder: Path) -> bool:
    """Return whether a run wrote more than its arguments; a run that failed before its first checkpoint did not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name not in (LOCK_FILE, RUN_FILE, CONFIG_FILE) and not name.startswith(UNFINISHED) for name in names)


def _carries_state(run: Path) -> bool:
    return bool((read_run_arguments(run) or {}).get("carry_state"))


def _check_family(checkpoint: Path, expected: str | None) -> None:
    found = read_map(checkpoint / "config.json").get("model_type")
    if expected is not None and found != expected:
        raise InputError(f"resume_from_checkpoint={checkpoint} is a model of type {found}, expected {expected}")


def check_same_run(output_dir: str, checkpoint: str | None, arguments: dict) -> None:
    """Save the arguments of a new run in its folder; check that a resumed run has the same arguments.

    Args:
        output_dir: the run's folder.
        checkpoint: the checkpoint to resume from; None for a new run.
        arguments: the `run_identity`, as plain values.

    Raises:
        InputError: an argument differs from the checkpoint's run; the message has the argument and both values.
    """
    arguments = json.loads(json.dumps(arguments, default=str))
    if checkpoint is None:
        with whole_files(output_dir, "output_dir") as folder:
            (folder / RUN_FILE).write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
        return
    file = Path(checkpoint).parent / RUN_FILE
    earlier = read_run_arguments(file.parent) or {}
    for name, value in arguments.items():
        if name in earlier and earlier[name] != value:
            raise InputError(
                f"{name}={value!r} differs from {name}={earlier[name]!r} of the run to be resumed ({file}); use the "
                "same value, or start a new run with --model_name_or_path"
            )
