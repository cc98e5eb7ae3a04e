"""Loads text for language models from files or the Hub, as one flat, memory-mapped stream of token ids."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, first_line
from .encoding import encode_lines
from .lines import read_lines
from .paths import expand_file_patterns

TEXT_FEATURES = Features({"text": Value("string")})
TOKEN_FEATURES = Features({"input_ids": List(Value("int32")), "num_words": Value("int32")})


def load_text_dataset(
    files: list[str] | None = None,
    *,
    hub_name: str | None = None,
    hub_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    keep_empty_lines: bool = True,
    max_lines: int | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    argument: str = "files",
) -> Dataset:
    """Load text as a memory-mapped dataset with the single column "text", one row per line without its line break.

    Lines end only at "\\n" or "\\r\\n". Files are cached by path, size and time.

    Args:
        files: UTF-8 text files, plain, .gz or .xz, as paths or globs; `~` and `${VARIABLE}` are expanded. Files are
            read in the order of the patterns, sorted for each pattern, and each file only once.
        hub_name: a name for `datasets.load_dataset`, instead of `files`.
        hub_config: configuration of the Hub dataset.
        split: split of the Hub dataset.
        text_column: text column of the Hub dataset.
        keep_empty_lines: whether empty lines become rows.
        max_lines: number of first lines to keep (empty lines count if they are kept); None for all.
        cache_dir: folder of the memory-mapped data; None for the default of `datasets`.
        num_proc: number of processes that read files.
        argument: the argument's name in error messages.

    Raises:
        InputError: both or neither of `files` and `hub_name` are given; a file is missing, unreadable, empty or not
            UTF-8, or changes while it is read; or the dataset or column does not exist or is not text.
    """
    if (files is None) == (hub_name is None):
        raise InputError(f"exactly one of files and hub_name is needed, got files={files} and hub_name={hub_name}")
    if max_lines is not None and max_lines < 1:
        raise InputError(f"max_lines={max_lines} must be at least 1 (or None for all lines)")
    if files is not None:
        paths = list(dict.fromkeys(expand_file_patterns(files, argument)))
        return _load_files(paths, keep_empty_lines, max_lines, cache_dir, num_proc)
    documents = _load_hub_column(hub_name, hub_config, split, text_column, cache_dir, num_proc)
    lines = documents.map(
        _split_lines_of_batch,
        batched=True,
        remove_columns=documents.column_names,
        features=TEXT_FEATURES,
        fn_kwargs={"text_column": text_column, "keep_empty_lines": keep_empty_lines},
        num_proc=num_proc,
        new_fingerprint=fingerprint("lines", documents._fingerprint, text_column, keep_empty_lines),
        desc="Splitting lines",
    )
    if len(lines) == 0:
        raise InputError(f"dataset_name={hub_name}: column {text_column!r} of split {split!r} has no text")
    return lines if max_lines is None else lines.select(range(min(max_lines, len(lines))))


def fingerprint(*parts) -> str:
    """Return a hash of plain values that is the same in every process."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _load_files(paths, keep_empty_lines, max_lines, cache_dir, num_proc) -> Dataset:
    options = {"keep_empty_lines": keep_empty_lines, "max_lines": max_lines}
    versions = [file_version(path) for path in paths]
    dataset = dataset_of_rows(
        _generate_rows,
        paths,
        features=TEXT_FEATURES,
        fingerprint=fingerprint("files", versions, options),
        cache_dir=cache_dir,
        num_proc=num_proc if max_lines is None else 1,  # max_lines needs a single process that counts
        **options,
    )
    check_unchanged(versions)
    return dataset


def dataset_of_rows(
    generate: Callable[..., Iterator[dict]],
    paths: list,
    *,
    features: Features,
    fingerprint: str,
    cache_dir: str | None,
    num_proc: int | None,
    **options: Any,
) -> Dataset:
    """Return the rows of `generate(paths, **options)` as a memory-mapped dataset.

    Args:
        generate: a generator function that yields rows as mappings.
        paths: the first argument of `generate`; each process gets a part of the paths.
        features: columns of the rows.
        fingerprint: cache name of the dataset.
        cache_dir: folder of the memory-mapped data; None for the default of `datasets`.
        num_proc: maximal number of processes.
        **options: further arguments of `generate`.

    Raises:
        InputError: `generate` raises it.
    """
    num_proc = min(num_proc or 1, len(paths))
    try:
        return Dataset.from_generator(
            generate,
            features=features,
            cache_dir=cache_dir,
            # `datasets` splits a list between its processes, and passes a tuple unchanged.
            gen_kwargs={"paths": list(paths) if num_proc > 1 else tuple(paths), **options},
            num_proc=num_proc if num_proc > 1 else None,
            fingerprint=fingerprint,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        for _ in generate(paths, **options):  # workers lose the cause; reading again names the file
            pass
        raise


def file_version(path: str) -> tuple[str, int, int]:
    """Return a file's path, size in bytes and time in nanoseconds, to detect changes.

    Raises:
        InputError: the file does not exist any more.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return path, found.st_size, found.st_mtime_ns


def check_unchanged(versions: list[tuple[str, int, int]]) -> None:
    """Check that files did not change while they were read.

    Args:
        versions: the results of `file_version` before reading.

    Raises:
        InputError: a file has another size or time.
    """
    for version in versions:
        if file_version(version[0]) != version:
            raise InputError(f"{version[0]}: the file changed while it was read; start again when it is complete")


def _generate_rows(paths, keep_empty_lines: bool, max_lines: int | None) -> Iterator[dict[str, str]]:
    num_lines = 0
    for path in paths:
        for line in read_lines(path):
            if keep_empty_lines or line.strip():
                yield {"text": line}
                num_lines += 1
                if num_lines == max_lines:
                    return


def _load_hub_column(hub_name, hub_config, split, text_column, cache_dir, num_proc) -> Dataset:
    dataset = load_hub_dataset(hub_name, hub_config, split, cache_dir=cache_dir, num_proc=num_proc)
    if text_column not in dataset.column_names:
        raise InputError(f"text_column={text_column!r} is not in {hub_name}, its columns are {dataset.column_names}")
    check_text_column(dataset.features[text_column], f"text_column={text_column!r}", hub_name)
    return dataset.select_columns([text_column])


def check_text_column(feature: Any, column: str, hub_name: str) -> None:
    """Check that a column of a dataset has text; a column of only None counts as empty text.

    Args:
        feature: the column's feature in `datasets`.
        column: the column's name in error messages.
        hub_name: the dataset's name.

    Raises:
        InputError: the column does not have text.
    """
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    if not isinstance(feature, Value) or kind not in ("string", "large_string", "string_view", "null"):
        raise InputError(f"dataset_name={hub_name}: {column} has {kind}, text (string) is needed")


def load_hub_dataset(
    hub_name: str, hub_config: str | None, split: str, *, cache_dir: str | None, num_proc: int | None
) -> Dataset:
    """Load a dataset with `datasets.load_dataset`.

    Args:
        hub_name: the dataset's name.
        hub_config: configuration of the dataset.
        split: split of the dataset.
        cache_dir: folder of the memory-mapped data; None for the default of `datasets`.
        num_proc: number of processes.

    Raises:
        InputError: the dataset, the configuration or the split cannot be loaded.
    """
    try:
        return load_dataset(hub_name, hub_config, split=split, cache_dir=cache_dir, num_proc=num_proc)
    except Exception as error:  # builders and file formats raise many kinds of errors
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = first_line(cause) or type(cause).__name__
        source = f"dataset_name={hub_name}, dataset_config_name={hub_config}, split={split}"
        raise InputError(f"{source}: the data set cannot be loaded ({reason})") from error


def _split_lines_of_batch(batch, text_column: str, keep_empty_lines: bool) -> dict[str, list[str]]:
    lines = []
    for document in batch[text_column]:
        lines += [line.removesuffix("\r") for line in (document or "").removesuffix("\n").split("\n")]
    return {"text": lines if keep_empty_lines else [line for line in lines if line.strip()]}


class TokenStream:
    """All token ids of a tokenised dataset, as one flat, read-only, memory-mapped sequence.

    `stream[a:b]` has the semantics of a list slice and copies to an int64 array (b - a,); `stream[i]` is an int.

    Args:
        dataset: columns "input_ids" and "num_words", one row per line.

    Attributes:
        dataset: the dataset.
        num_lines: number of lines.
        num_words: whitespace-separated words plus one end of sentence per line, the unit of per-word perplexity.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in dataset.data.column("input_ids").chunks]
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._offsets = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self.num_lines = len(dataset)
        self.num_words = pc.sum(dataset.data.column("num_words")).as_py()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, key: int | slice) -> int | np.ndarray:
        positions = range(len(self))[key]
        if isinstance(positions, int):
            return int(self._read(positions, positions + 1)[0])
        if len(positions) == 0:
            return np.empty(0, dtype=np.int64)
        low, high = sorted((positions[0], positions[-1]))
        tokens = self._read(low, high + 1)
        return tokens if positions.step == 1 else tokens[:: positions.step].copy()

    def __reduce__(self):
        return TokenStream, (self._dataset,)  # pickles the paths of the mapped files, not their contents

    def _read(self, start: int, stop: int) -> np.ndarray:
        tokens = np.empty(stop - start, dtype=np.int64)
        index = int(np.searchsorted(self._offsets, start, side="right")) - 1
        position = start
        while position < stop:
            offset = int(self._offsets[index])
            piece = self._chunks[index][position - offset : stop - offset]
            tokens[position - start : position - start + len(piece)] = piece
            position += len(piece)
            index += 1
        return tokens


def tokenize_to_stream(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None, batch_size: int = 1000
) -> TokenStream:
    """Tokenise the lines of `dataset` into one stream of ids, with an end-of-sentence token after each line.

    Other special tokens are not added, and text that spells one is encoded as text (`encode_lines`). The result is
    cached beside the dataset and reused by later runs and other processes.

    Args:
        dataset: the lines, in the column "text".
        tokenizer: a tokenizer with eos_token_id.
        num_proc: number of processes.
        batch_size: number of lines tokenised at once.

    Raises:
        InputError: `tokenizer` does not have eos_token_id, or the dataset has fewer than 2 tokens or no text.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has eos_token_id=None, an end-of-sentence token is needed"
        )
    tokens = dataset.map(
        _tokenize_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=TOKEN_FEATURES,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=num_proc,
        new_fingerprint=fingerprint("tokens, text only", dataset._fingerprint, serialize_tokenizer(tokenizer)),
        desc="Tokenizing",
    )
    num_tokens = len(stream := TokenStream(tokens)) if len(tokens) else 0
    if num_tokens < 2:
        raise InputError(f"dataset: {len(dataset)} lines have {num_tokens} tokens, at least 2 are needed")
    if stream.num_words == stream.num_lines:
        raise InputError(f"dataset: the {stream.num_lines} lines have no text")
    return stream


def _tokenize_batch(batch, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    lines = batch["text"]
    encoded = encode_lines(tokenizer, lines)
    words = pa.array((len(line.split()) + 1 for line in lines), type=pa.int32())
    return pa.table({"input_ids": lists_of_ids(encoded, end=tokenizer.eos_token_id), "num_words": words})


def lists_of_ids(encoded: Sequence[Sequence[int]], *, end: int) -> pa.ListArray:
    """Return each text's ids, followed by `end`, as an Arrow array, without a Python object for each list.

    Args:
        encoded: the ids of each text.
        end: id of the end of sentence.
    """
    stops = np.cumsum([len(ids) + 1 for ids in encoded], dtype=np.int64)
    values = np.full(stops[-1] if len(stops) else 0, end, dtype=np.int32)
    is_end = np.zeros(len(values), dtype=bool)
    is_end[stops - 1] = True
    values[~is_end] = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=len(values) - len(stops))
    return pa.ListArray.from_arrays(pa.array([0, *stops.tolist()], type=pa.int32()), pa.array(values))


def serialize_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list:
    """Return everything that determines the ids of a text, without truncation and padding of the last call."""
    options = [type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return [*options, repr(tokenizer), tokenizer.get_vocab()]
    return [*options, json.loads(backend.to_str()) | {"truncation": None, "padding": None}]
