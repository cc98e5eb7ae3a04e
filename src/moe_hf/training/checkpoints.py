"""Where a run goes on: refuses to overwrite, finds the last whole checkpoint, tells one of another run."""

import json
import logging
from pathlib import Path

from ..errors import InputError
from ..old_names import with_new_names
from ..run_folder import RUN_FILE, check_checkpoint, list_checkpoints
from ..writing import check_folder, naming, whole_files

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
    with naming("output_dir", output_dir):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir={output_dir} is a file, expected a folder")
    check_folder(output_dir, "output_dir")
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


def check_same_run(output_dir: str, checkpoint: str | None, arguments: dict) -> None:
    """Keep the arguments of a new run in its folder; those of a resumed run must be the same.

    Args:
        output_dir: folder of the run.
        checkpoint: what is resumed from, None for a new run.
        arguments: the `run_identity`, as plain values.

    Raises:
        InputError: an argument differs from the run that the checkpoint belongs to; names it and both values.
    """
    arguments = json.loads(json.dumps(arguments, default=str))
    if checkpoint is None:
        with whole_files(output_dir, "output_dir") as folder:
            (folder / RUN_FILE).write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
        return
    file = Path(checkpoint).parent / RUN_FILE
    if not file.is_file():
        return
    earlier = with_new_names(json.loads(file.read_text(encoding="utf-8")))
    for name, value in arguments.items():
        if name in earlier and earlier[name] != value:
            raise InputError(
                f"{name}={value!r} differs from {name}={earlier[name]!r} of the run to be resumed ({file}); give the "
                "same, or start a new run with --model_name_or_path"
            )
