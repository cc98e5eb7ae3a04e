"""The parts of a model card that come from a training's arguments: data, languages and search, without local paths."""

import json
import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .data.pair_sources import PairSource, read_pair_sources
from .data.translation_tokenizers import known_languages
from .errors import InputError
from .evaluation.records import EVAL_NUM_BEAMS
from .model_files import ADVICE, read_run_file
from .old_names import with_new_names
from .run_folder import CONFIG_FILE

# Arguments of a run that a card shows: names of files (one or a list), and other texts.
FILES = ("validation_files", "validation_source_files", "validation_target_files")
TEXTS = ("dataset_name", "validation_split", "source_language", "target_language", "tokenizer_name_or_path")


def read_run(folder: Path) -> dict:
    """Return the arguments that a training saved in its folder, or {}; pairs given as JSON text become lists.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / CONFIG_FILE
    run = with_new_names(read_run_file(path))
    for name in FILES + TEXTS:
        values = run.get(name) if name in FILES and isinstance(run.get(name), list) else [run.get(name)]
        if not all(value is None or isinstance(value, str) for value in values):
            raise InputError(f"{path}: {name}={run[name]!r} is not a text: {ADVICE}")
    for name in ("train_pairs", "validation_pairs"):
        if isinstance(run.get(name), str):
            try:
                run[name] = json.loads(run[name])
            except ValueError as error:
                raise InputError(f"{path}: {name} is not JSON ({error}): {ADVICE}") from error
    return run


def pair_sources(run: dict, part: str) -> list[PairSource]:
    """Return the sentence pairs that `{part}_pairs` names."""
    return read_pair_sources(run[f"{part}_pairs"], f"{part}_pairs") if run.get(f"{part}_pairs") else []


def evaluation_files(run: dict) -> list[str]:
    """Return the files, or the dataset of the Hub, that the run was evaluated on."""
    files = []

    def add(value: list[str] | str | None) -> None:
        files.extend([value] if isinstance(value, str) else value or [])

    for side in ("", "source_", "target_"):
        add(run.get(f"validation_{side}files"))
    for source in pair_sources(run, "validation"):
        for value in (source.source_files, source.target_files, source.files):
            add(value)
        if source.dataset_name:
            files.append(f"{source.dataset_name} ({source.split})")
    if not files and run.get("dataset_name"):
        files = [f"{run['dataset_name']} ({run.get('validation_split') or 'validation'})"]
    return list(dict.fromkeys(files))


def languages(run: dict) -> list[str]:
    """Return the languages that a translation model's training names, in order."""
    names = [run.get("source_language"), run.get("target_language")]
    for source in pair_sources(run, "train"):
        names += [source.source_language, source.target_language]
    return list(dict.fromkeys(name for name in names if name))


def directions(run: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the directions of a translation model, such as "en → de"; "" if training and tokenizer name none."""
    pairs = [(source.source_language, source.target_language) for source in pair_sources(run, "train")]
    pairs = pairs or [(run.get("source_language"), run.get("target_language"))]
    named = dict.fromkeys(f"{source} → {target}" for source, target in pairs if source and target)
    if not named and (known := known_languages(tokenizer)):
        return f"into {', '.join(known)}"
    return ", ".join(named)


def search(run: dict) -> str:
    """Return the search that made the translations which a training scored."""
    beams = run.get("eval_num_beams", EVAL_NUM_BEAMS)
    return "greedy search" if beams == 1 else f"{beams} beams"


def for_others(run: dict, repo_id: str) -> dict:
    """Return the arguments of a training without local folders; the tokenizer becomes the repository's."""
    run = {key: value for key, value in run.items() if key != "cache_dir"}
    tokenizer = run.get("tokenizer_name_or_path")
    if tokenizer and (Path(tokenizer).exists() or Path(tokenizer).is_absolute() or tokenizer.count("/") > 1):
        run["tokenizer_name_or_path"] = repo_id
    return without_folders(run) | {"output_dir": f"runs/{repo_id.rpartition('/')[2]}"}


def without_folders(value):
    """Return the value with absolute paths reduced to their file names, inside lists and mappings too."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    option, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    return option + equals + (Path(path).name if os.path.isabs(path) else path)
