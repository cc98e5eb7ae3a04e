"""Loads sentence pairs from files or the Hub as a memory-mapped dataset, and counts the pairs that are left out."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Translation, Value, concatenate_datasets

from ..errors import InputError
from .lines import read_lines
from .pair_sources import PairSource
from .paths import expand_file_patterns
from .text import check_text_column, check_unchanged, dataset_of_rows, file_version, fingerprint, load_hub_dataset

PAIR_FEATURES = Features({"source": Value("string"), "target": Value("string")})


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of one or more directions.

    Attributes:
        dataset: columns "source", "target" (text), "direction" (int32, an index into `directions`) and "row" (int64,
            the index of the pair in its source, from 0).
        directions: (source language, target language) pairs; an unknown language is None.
        num_read: number of pairs read.
        num_empty: number of pairs left out because a side is empty (white space only).
    """

    dataset: Dataset
    directions: list[tuple[str | None, str | None]]
    num_read: int
    num_empty: int

    @property
    def tagged_languages(self) -> list[str]:
        """Return the target languages that need tags in a tokenizer: none if there is a single direction."""
        return sorted({target for _, target in self.directions}) if len(self.directions) > 1 else []

    def texts(self) -> Iterator[str]:
        """Yield both sides of every pair; a sentence of several pairs appears in each of them."""
        for batch in self.dataset.iter(batch_size=1000):
            yield from batch["source"]
            yield from batch["target"]

    def __str__(self) -> str:
        return f"{len(self.dataset):,} pairs, {self.num_empty:,} of {self.num_read:,} left out as a side is empty"


def load_sentence_pairs(
    sources: Sequence[PairSource],
    *,
    max_pairs: int | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    argument: str = "{}",
) -> SentencePairs:
    """Load all pairs of `sources`; several sources may have the same direction.

    - Text is UTF-8; lines end only at "\\n" or "\\r\\n".
    - A TSV line is source, one tab, target, without quoting.
    - A JSONL line is {"translation": {language: text, ...}} or {"source": text, "target": text}.
    - A Hub dataset has a column "translation" with a mapping of languages, or one column per language. None counts as
      empty text.
    - Texts of JSONL and of the Hub keep their line breaks, so a model trained on them may write line breaks.
    - Pairs with an empty side are left out and counted.

    Args:
        sources: the sources of the pairs.
        max_pairs: number of first pairs to read from each source; None for all.
        cache_dir: folder of the memory-mapped data; None for the default of `datasets`.
        num_proc: number of processes that read files.
        argument: name of a field of the sources in error messages, such as "train_{}".

    Raises:
        InputError: there are no sources; languages are missing although there are several directions or language keys;
            a file cannot be read, is not UTF-8, changes while it is read, or differs in length from its counterpart; a
            line is malformed; a column is not text; or no pairs are left.
    """
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs={max_pairs} must be at least 1 (or None for all pairs)")
    if not sources:
        raise InputError("no sentence pairs are named, at least one source is needed")
    directions = list(dict.fromkeys((source.source_language, source.target_language) for source in sources))
    if len(directions) > 1 and any(None in direction for direction in directions):
        names = ", ".join(source.direction for source in sources)
        raise InputError(f"several directions need source_language and target_language each, got: {names}")
    parts, num_read = [], 0
    for source in sources:
        part = _load_source(source, cache_dir, num_proc, argument)
        if max_pairs is not None:
            part = part.select(range(min(max_pairs, len(part))))
        num_read += len(part)
        direction = directions.index((source.source_language, source.target_language))
        parts.append(_without_empty(part, direction, num_proc))
    dataset = concatenate_datasets(parts)
    if len(dataset) == 0:
        raise InputError(f"{_name(sources[0])}: no pair has text on both sides, of {num_read} read")
    return SentencePairs(dataset, directions, num_read, num_read - len(dataset))


def _load_source(source: PairSource, cache_dir, num_proc, argument: str) -> Dataset:
    if source.dataset_name:
        return _load_hub_pairs(source, cache_dir, num_proc)
    languages = (source.source_language, source.target_language)
    if source.files:
        paths = expand_file_patterns(source.files, argument.format("files"))
        generate, options = _generate_from_files, {"languages": languages}
    else:
        sides = {argument.format(name): getattr(source, name) for name in ("source_files", "target_files")}
        pair = [expand_file_patterns(files, name) for name, files in sides.items()]
        if len(pair[0]) != len(pair[1]):
            counts = [f"{name}={files} are {len(paths)}" for (name, files), paths in zip(sides.items(), pair)]
            raise InputError(f"{counts[0]} files, {counts[1]}: they must be equally many")
        paths, generate, options = list(zip(*pair)), _generate_from_aligned_files, {}
    versions = [file_version(path) for entry in paths for path in ([entry] if source.files else entry)]
    dataset = dataset_of_rows(
        generate,
        paths,
        features=PAIR_FEATURES,
        fingerprint=fingerprint("pairs", generate.__name__, versions, options),
        cache_dir=cache_dir,
        num_proc=num_proc,
        **options,
    )
    check_unchanged(versions)
    return dataset


def _generate_from_aligned_files(paths: Sequence[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for source_path, target_path in paths:
        counts = [0, 0]
        for source, target in zip_longest(read_lines(source_path), read_lines(target_path)):
            counts[0] += source is not None
            counts[1] += target is not None
            if counts[0] == counts[1]:
                yield {"source": source, "target": target}
        if counts[0] != counts[1]:
            raise InputError(
                f"{source_path} has {counts[0]} lines and {target_path} has {counts[1]}: "
                "aligned files must have equally many"
            )


def _generate_from_files(paths: Sequence[str], languages: tuple[str | None, str | None]) -> Iterator[dict[str, str]]:
    for path in paths:
        parse = _parser_for(path)
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                yield {"source": "", "target": ""}
                continue
            try:
                source, target = parse(line, languages)
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from None
            yield {"source": source, "target": target}


def _parser_for(path: str) -> Callable:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".xz")]
    parsers = {".tsv": _parse_tsv, ".jsonl": _parse_jsonl}
    if not suffixes or suffixes[-1] not in parsers:
        raise InputError(f"{path}: files with both sides must be .tsv or .jsonl (or .gz, .xz of them)")
    return parsers[suffixes[-1]]


def _parse_tsv(line: str, languages) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2:
        some = "1 column" if len(columns) == 1 else f"{len(columns)} columns"
        raise ValueError(f"{some}, expected 2: source, one tab, target")
    return columns[0], columns[1]


def _parse_jsonl(line: str, languages) -> tuple[str, str]:
    try:
        row = json.loads(line, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply, expected texts under two keys") from None
    keys, texts = ("source", "target"), row
    if isinstance(row, dict) and "translation" in row:
        if None in languages:
            raise ValueError(f'"translation" needs source_language and target_language, got {languages}')
        keys, texts = languages, row["translation"]
    wanted = f"no text under the keys {keys[0]!r} and {keys[1]!r}"
    if not isinstance(texts, dict):
        raise ValueError(f"{wanted}, but a JSON {type(texts).__name__} in their place")
    for key in keys:
        if key not in texts:
            raise ValueError(f"{wanted}, there are {', '.join(map(repr, list(texts)[:8])) or 'none'}")
        if not isinstance(text := texts[key], str):
            raise ValueError(f"{wanted}, {key!r} has a JSON {type(text).__name__}")
        text.encode()  # JSON can contain half a surrogate pair, such as "\\ud83d", which UTF-8 cannot encode
    return texts[keys[0]], texts[keys[1]]


def _without_repetition(items: list[tuple[str, Any]]) -> dict:
    """Return the mapping of a JSON object; refuse repeated keys, of which JSON readers silently take the last."""
    if len(found := dict(items)) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def _load_hub_pairs(source: PairSource, cache_dir, num_proc) -> Dataset:
    name, languages = source.dataset_name, (source.source_language, source.target_language)
    if None in languages:
        raise InputError(f"dataset_name={name} needs source_language and target_language, got {languages}")
    dataset = load_hub_dataset(name, source.dataset_config_name, source.split, cache_dir=cache_dir, num_proc=num_proc)
    nested = "translation" in dataset.column_names
    columns = _columns_by_language(dataset.features["translation"], name) if nested else dataset.features
    for language in languages:
        if language not in columns:
            known = ", ".join(map(str, columns))
            raise InputError(f"dataset_name={name} has no language {language!r}, it has {known}")
        check_text_column(columns[language], f"the column of {language!r}", name)
    return dataset.map(
        _pick_languages_of_batch,
        batched=True,
        remove_columns=dataset.column_names,
        features=PAIR_FEATURES,
        fn_kwargs={"languages": languages, "nested": nested},
        num_proc=num_proc,
        new_fingerprint=fingerprint("hub pairs", dataset._fingerprint, languages),
        desc="Picking languages",
    )


def _columns_by_language(feature, name: str) -> dict:
    """Return the types of a column "translation" by language."""
    if isinstance(feature, Translation):
        return {language: Value("string") for language in feature.languages}
    if not isinstance(feature, dict):
        kind = getattr(feature, "dtype", None) or type(feature).__name__
        raise InputError(f"dataset_name={name}: the column 'translation' has {kind}, expected {{language: text}}")
    return feature


def _pick_languages_of_batch(batch, languages: tuple[str, str], nested: bool) -> dict[str, list[str]]:
    rows = batch["translation"] if nested else None
    texts = [[(row or {}).get(language) for row in rows] if nested else batch[language] for language in languages]
    return {name: [text or "" for text in side] for name, side in zip(("source", "target"), texts)}


def _without_empty(dataset: Dataset, direction: int, num_proc) -> Dataset:
    return dataset.map(
        _keep_full_pairs_of_batch,
        batched=True,
        with_indices=True,
        features=Features({**PAIR_FEATURES, "direction": Value("int32"), "row": Value("int64")}),
        fn_kwargs={"direction": direction},
        num_proc=num_proc,
        new_fingerprint=fingerprint("full pairs, numbered", dataset._fingerprint, direction),
        desc="Leaving out empty pairs",
    )


def _keep_full_pairs_of_batch(batch, rows: list[int], direction: int) -> dict[str, list]:
    pairs = zip(batch["source"], batch["target"], rows)
    kept = [(source, target, direction, row) for source, target, row in pairs if source.strip() and target.strip()]
    return {name: [pair[i] for pair in kept] for i, name in enumerate(("source", "target", "direction", "row"))}


def _name(source: PairSource) -> str:
    return str(source.dataset_name or source.files or source.source_files)
