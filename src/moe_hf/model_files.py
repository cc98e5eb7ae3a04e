"""Reads each file of a model's folder before the library does, because the library's errors do not name the file."""

import json
from pathlib import Path

import yaml
from safetensors import safe_open

from .errors import InputError

MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
# Advice for optional files of a model.
ADVICE = "restore the file, or delete it to continue without its records"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_map(path: Path) -> dict:
    """Read a JSON file that holds a map.

    Raises:
        ValueError: the file cannot be read, or does not hold a map; the message starts with the file's name.
    """
    return _read_json(path, dict)


def _read_json(path: Path, kind: type) -> dict | list:
    if not path.is_file():  # reading a device might never end
        raise ValueError(f"{path.name} is not a file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {_reason(error)}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path.name} holds {_kind(value)}, expected a JSON {'map' if kind is dict else 'list'}")
    return value


def check_files(folder: str | Path, names: tuple[str, ...]) -> None:
    """Check that the named files in a folder are JSON maps; the library reports missing files.

    Args:
        folder: folder of a model or a tokenizer; a Hub name has no files to check.
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
    """Check that a model's weight files are complete, and are inside the model's folder.

    Args:
        folder: a model's folder; a Hub name has no files to check.

    Raises:
        ValueError: a file is damaged or missing, or the index names a file in another folder.
    """
    folder = Path(folder)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("shard-*.safetensors"))
    if not files and (folder / INDEX).exists():
        files = _indexed_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # safetensors raises its own errors for a damaged header
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
    """Read a JSON file that a training, an evaluation or an average wrote into a model's folder.

    Args:
        path: a JSON file.
        kind: dict or list.

    Returns:
        The file's value, or an empty value if the file does not exist.

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
    """Read the arguments that a training saved in its folder.

    Args:
        path: a YAML file.

    Returns:
        {argument: value}, empty if the file does not exist.

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
    """Return the first line of an error, without an OSError's path, which the message names already."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
