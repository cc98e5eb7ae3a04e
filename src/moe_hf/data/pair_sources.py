"""Describes a source of sentence pairs, as written in a configuration."""

import dataclasses
import difflib
from dataclasses import dataclass
from itertools import permutations
from typing import get_type_hints

from ..errors import InputError
from ..value_checks import read_json, shown, typed


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """A source of sentence pairs for one translation direction.

    Exactly one of these must be given: `source_files` with `target_files`, `files`, or `dataset_name`.

    Attributes:
        source_files: aligned text files; globs are allowed. Line n is translated by line n of the target file. A file
            that is named twice is read twice, with the corresponding target files.
        target_files: the translations, paired with `source_files` in order.
        files: files with both sides, .tsv (source, tab, target) or .jsonl, also compressed as .gz or .xz.
        dataset_name: a name for `datasets.load_dataset`.
        dataset_config_name: configuration of the dataset.
        split: split of the dataset.
        source_language: code of the source language; needed for data with language keys.
        target_language: code of the target language; needed for data with language keys.

    Raises:
        InputError: no origin or several origins are given, or a language is not text.
    """

    source_files: list[str] | str | None = None
    target_files: list[str] | str | None = None
    files: list[str] | str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    source_language: str | None = None
    target_language: str | None = None

    def __post_init__(self):
        for name, annotation in get_type_hints(PairSource).items():
            typed(name, getattr(self, name), annotation)
        if bool(self.source_files) != bool(self.target_files):
            given, other = ("source", "target") if self.source_files else ("target", "source")
            raise InputError(f"{given}_files={getattr(self, given + '_files')} needs {other}_files as well")
        origins = [self.source_files, self.files, self.dataset_name]
        if sum(map(bool, origins)) != 1:
            raise InputError(
                "exactly one of source_files with target_files, files, and dataset_name is needed, got "
                f"source_files={self.source_files}, files={self.files}, dataset_name={self.dataset_name}"
            )

    @property
    def direction(self) -> str:
        """A name such as "en-de", with "?" for an unknown language."""
        return f"{self.source_language or '?'}-{self.target_language or '?'}"


def read_pair_sources(value: list | str, name: str) -> list[PairSource]:
    """Read pair sources from a configuration's list of mappings, or from its JSON text.

    The keys of a mapping are the fields of `PairSource`. A mapping with the single key `parallel_files` has the form
    {language: files}: aligned files in several languages, which give all directions between the languages.

    Args:
        value: the list, or its JSON text.
        name: the argument's name in error messages.

    Returns:
        One `PairSource` for each direction, in the order of `value`.

    Raises:
        InputError: the value is not a list of mappings, a key is not known, or `PairSource` raises it.
    """
    if isinstance(value, str):
        value = read_json(name, value)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"{name}={shown(value)} must be a list of mappings, at least one")
    sources = []
    for number, entry in enumerate(value, start=1):
        try:
            sources += [PairSource(**fields) for fields in _all_directions(entry)]
        except InputError as error:
            raise InputError(f"{name}, entry {number}: {error}") from error
    return sources


def _all_directions(entry: dict) -> list[dict]:
    known = [field.name for field in dataclasses.fields(PairSource)]
    for key in entry:
        if key not in known and key != "parallel_files":
            near = difflib.get_close_matches(str(key), [*known, "parallel_files"], n=1)
            raise InputError(f"no field is named {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    if "parallel_files" not in entry:
        return [entry]
    files = entry["parallel_files"]
    if len(entry) > 1 or not isinstance(files, dict) or len(files) < 2:
        raise InputError(
            f"parallel_files={shown(files)} must be {{language: files}} of two or more, without other fields"
        )
    for language, names in files.items():
        typed(f"parallel_files[{language}]", names, list[str] | str)
    return [
        {"source_files": files[a], "target_files": files[b], "source_language": a, "target_language": b}
        for a, b in permutations(files, 2)
    ]
