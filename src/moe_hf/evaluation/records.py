"""Saves evaluations and their commands in a model's folder, for the model card."""

import argparse
import json
import shlex
from pathlib import Path

from ..errors import InputError
from ..model_files import ADVICE, read_record
from ..writing import check_file, write_file

FILE = "evaluations.json"
# Default beam size of evaluations during training.
EVAL_NUM_BEAMS = 1


def check_recordable(model: str) -> None:
    """Check that an evaluation can be saved in a model's folder.

    Args:
        model: the model's folder.

    Raises:
        InputError: `model` is not a folder, or its records cannot be read or written.
    """
    if not Path(model).is_dir():
        raise InputError(f"record: model={model!r} is not a folder, evaluations are kept in the model's folder")
    check_file(Path(model) / FILE, "record")
    read_evaluations(model)


def record_evaluation(
    model: str, command: str, argv: list[str], files: list[str], metrics: dict[str, float | str]
) -> None:
    """Save an evaluation in the model's folder, replacing an evaluation with the same arguments.

    Args:
        model: the model's folder.
        command: the subcommand of `moe-hf` that ran the evaluation.
        argv: the arguments of that command. The output file is left out, because it does not change the result.
        files: the files of the evaluation.
        metrics: {name: value}, with or without the prefix "eval_".
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--output")
    _, arguments = parser.parse_known_args(argv)
    arguments.remove(model)
    record = {"command": command, "arguments": arguments, "files": files, "metrics": metrics}
    others = [
        other for other in read_evaluations(model) if (other["command"], other["arguments"]) != (command, arguments)
    ]
    text = json.dumps([*others, record], indent=2, ensure_ascii=False) + "\n"
    write_file(Path(model) / FILE, text, "record")


def read_evaluations(model: str | Path) -> list[dict]:
    """Return the evaluations that `record_evaluation` saved; an empty list for a model without records.

    Raises:
        InputError: the file is damaged.
    """
    path = Path(model) / FILE
    records = read_record(path, list)
    for number, record in enumerate(records, start=1):
        if not _is_record(record):
            raise InputError(f"{path}: evaluation {number} of {len(records)} is damaged: {ADVICE}")
    return records


def _is_record(record) -> bool:
    if not isinstance(record, dict):
        return False
    command, arguments, files, metrics = (record.get(name) for name in ("command", "arguments", "files", "metrics"))
    if not (isinstance(arguments, list) and isinstance(files, list) and isinstance(metrics, dict)):
        return False
    return all(isinstance(text, str) for text in [command, *arguments, *files])


def command_line(record: dict, model: str) -> str:
    """Return the command of a record, with `model` as the model."""
    return shlex.join(["moe-hf", record["command"], model, *record["arguments"]])
