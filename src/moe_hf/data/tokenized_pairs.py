"""Tokenises sentence pairs with their lengths, and leaves out long pairs of the training data."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .sentence_pairs import SentencePairs
from .text import fingerprint, serialize_tokenizer
from .translation_tokenizers import encode_texts, known_languages, language_tag_id

TOKEN_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "source_length": Value("int32"),
        "target_length": Value("int32"),
        "target_words": Value("int32"),
        "direction": Value("int32"),
    }
)


def tokenize_pairs(
    pairs: SentencePairs, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None, batch_size: int = 1000
) -> Dataset:
    """Tokenise every pair, and cache the result beside the text.

    The dataset has one row per pair, and these columns:

    - "input_ids": the target language's tag (if `tokenizer` has tags), the source, and "</s>".
    - "labels": the target and "</s>".
    - "source_length" and "target_length": numbers of tokens.
    - "target_words": whitespace-separated words of the target plus one for its end, the unit of per-word perplexity.
    - "direction": index into `pairs.directions`.

    Args:
        pairs: the text.
        tokenizer: a tokenizer with a tag for each of `pairs.tagged_languages`.
        num_proc: number of processes.
        batch_size: number of pairs tokenised at once.

    Raises:
        InputError: there are several directions but no tags, or a target language does not have a tag.
    """
    tags = _tags(pairs.directions, tokenizer)
    return pairs.dataset.map(
        _tokenize_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=pairs.dataset.column_names,
        features=TOKEN_FEATURES,
        fn_kwargs={"tokenizer": tokenizer, "tags": tags},
        num_proc=num_proc,
        new_fingerprint=fingerprint("token pairs", pairs.dataset._fingerprint, serialize_tokenizer(tokenizer), tags),
        desc="Tokenizing pairs",
    )


def leave_out_long_pairs(
    dataset: Dataset, max_source_length: int | None, max_target_length: int | None
) -> tuple[Dataset, int]:
    """Leave out pairs of a training set with too many tokens on either side.

    The limits include the tag and "</s>". Pairs are not truncated, because a truncated pair is not a translation.
    Evaluation sets keep all pairs.

    Args:
        dataset: a result of `tokenize_pairs`.
        max_source_length: maximal number of source tokens; None: no limit.
        max_target_length: maximal number of target tokens; None: no limit.

    Returns:
        The remaining pairs, and the number of pairs that were left out.

    Raises:
        InputError: no pair is left.
    """
    keep = np.ones(len(dataset), dtype=bool)
    for column, limit in (("source_length", max_source_length), ("target_length", max_target_length)):
        if limit is not None:
            keep &= column_to_numpy(dataset, column) <= limit
    num_long = int((~keep).sum())
    if num_long == len(dataset):
        raise InputError(
            f"max_source_length={max_source_length}, max_target_length={max_target_length} leave none of the "
            f"{len(dataset)} pairs"
        )
    return (dataset.select(np.flatnonzero(keep)) if num_long else dataset), num_long


def column_to_numpy(dataset: Dataset, column: str) -> np.ndarray:
    """Return a column of numbers as an array, in row order."""
    return np.asarray(dataset.with_format("numpy")[column][:])


def _tags(directions: Sequence[tuple[str | None, str | None]], tokenizer) -> list[int | None]:
    """Return the tag before the sources of each direction."""
    if known := known_languages(tokenizer):
        if any(target is None for _, target in directions):
            raise InputError(f"target_language is not given, the tokenizer has tags for {', '.join(known)}")
        return [language_tag_id(tokenizer, target) for _, target in directions]
    if len(directions) > 1:
        raise InputError(f"there are {len(directions)} directions, but the tokenizer has no language tags")
    return [None]


def _tokenize_batch(batch, tokenizer, tags: list[int | None]) -> dict[str, list]:
    sources, targets = encode_texts(tokenizer, batch["source"]), encode_texts(tokenizer, batch["target"])
    sources = [
        ids if tags[direction] is None else [tags[direction], *ids]
        for ids, direction in zip(sources, batch["direction"])
    ]
    return {
        "input_ids": sources,
        "labels": targets,
        "source_length": [len(ids) for ids in sources],
        "target_length": [len(ids) for ids in targets],
        "target_words": [len(target.split()) + 1 for target in batch["target"]],
        "direction": batch["direction"],
    }
