"""Reads each file of a model's folder before the library does, since the library's errors do not name the file."""

import json
from pathlib import Path

import yaml
from safetensors import safe_open

from .errors import InputError

MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
# For files that a model works without.
ADVICE = "restore the file, or delete it to go on without what it records"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_map(path: Path) -> dict:
    """Read a JSON file that holds a map.

    Raises:
        ValueError: it cannot be read, or holds something else; the message starts with the file's name.
    """
    return _read_json(path, dict)


def _read_json(path: Path, kind: type) -> dict | list:
    if not path.is_file():  # a device has no end
        raise ValueError(f"{path.name} is not a file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {_reason(error)}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path.name} holds {_kind(value)}, expected a JSON {'map' if kind is dict else 'list'}")
    return value


def check_files(folder: str | Path, names: tuple[str, ...]) -> None:
    """Check that a folder's files of these names are JSON maps; one that is missing is left to the library.

    Args:
        folder: of a model or a tokenizer; a Hub name has no files here.
        names: `MODEL_FILES` or `TOKENIZER_FILES`.

    Raises:
        ValueError: a file is damaged, or `folder` is itself a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError("it is a file, expected a folder")
    for name in names:
        if (folder / name).exists():
            read_map(folder / name)


def check_weight_files(folder: str | Path) -> None:
    """Check that the files of a folder's weights are whole, and lie in the folder.

    Args:
        folder: of a model; a Hub name has no files here.

    Raises:
        ValueError: a file is damaged or missing, or the index names one that is elsewhere.
    """
    folder = Path(folder)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("shard-*.safetensors"))
    if not files and (folder / INDEX).exists():
        files = _indexed_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # a broken header raises the library's own errors
            raise ValueError(f"{file.name} cannot be read: {_reason(error)}") from error


def _indexed_files(folder: Path) -> list[Path]:
    names = read_map(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(read_map(folder / INDEX).get("metadata", {}), dict):
        raise ValueError(f"{INDEX} has no weight_map of the weights' files")
    for weight, name in names.items():
        if not isinstance(name, str) or name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{INDEX} names {name!r} for {weight}, expected a file in the same folder")
        if not (folder / name).is_file():
            raise ValueError(f"{INDEX} names {name!r} for {weight}, which is missing from the folder")
    return [folder / name for name in sorted(set(names.values()))]


def read_record(path: Path, kind: type = dict) -> dict | list:
    """Read what a training, an evaluation or an average left in a model's folder.

    Args:
        path: a JSON file.
        kind: dict or list.

    Returns:
        Its value; of a file that does not exist an empty one.

    Raises:
        InputError: the file is damaged, or holds another kind of value.
    """
    _refuse_folder(path)
    if not path.is_file():
        return kind()
    try:
        return _read_json(path, kind)
    except ValueError as error:
        raise InputError(f"{path.parent}: {error}: {ADVICE}") from error


def read_run_file(path: Path) -> dict:
    """Read the arguments that a training left in its folder.

    Args:
        path: a YAML file.

    Returns:
        {argument: value}, empty if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    _refuse_folder(path)
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({_reason(error)}): {ADVICE}") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{path} holds {_kind(value)}, expected arguments by name: {ADVICE}")
    return value


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file: {ADVICE}")


def _kind(value) -> str:
    names = {list: "a list", dict: "a map", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: BaseException) -> str:
    """The first line of an error; an OSError's without the path, which the message has already."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
