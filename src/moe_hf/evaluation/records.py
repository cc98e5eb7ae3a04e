"""Evaluations kept beside a model, with their commands, for its model card."""

import argparse
import json
import shlex
from pathlib import Path

from ..errors import InputError
from ..model_files import ADVICE, read_record
from ..writing import check_file, write_file

FILE = "evaluations.json"
# Of the search for translations while a model trains, unless its arguments say otherwise.
EVAL_NUM_BEAMS = 1


def check_recordable(model: str) -> None:
    """Check that an evaluation can be kept beside a model.

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
    """Keep what an evaluation found in the model's folder; one with the same arguments is replaced.

    Args:
        model: the folder.
        command: the subcommand of `moe-hf` that evaluated it.
        argv: the arguments of that command; where its output goes is left out, as it does not change the result.
        files: what the model was judged on.
        metrics: by name, "eval_" before it or not.
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
    """What `record_evaluation` kept; of a model without records, nothing.

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
    """The command that a record is from, with `model` for the model."""
    return shlex.join(["moe-hf", record["command"], model, *record["arguments"]])
