"""Converts lines of text to token ids in bounded memory; text that spells a special token stays text."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Characters encoded at once: an encoding needs about 180 bytes per character.
PORTION = 1 << 20
# A space between words; text can be cut before it.
_CUT = re.compile(r"(?<=\S) (?=\S)")


def encode_lines(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> list[list[int]]:
    """Return token ids of each line, without the special tokens that the tokenizer would add.

    Text that spells a special token is encoded as text, regardless of `tokenizer.split_special_tokens`. A tokenizer of
    words encodes a word that spells the end symbol as unknown.

    Args:
        tokenizer: any tokenizer.
        lines: the text.
    """
    cuts_at_spaces = _cuts_at_spaces(tokenizer)
    pieces = [split_long_line(line) if cuts_at_spaces else [line] for line in lines]
    found = iter(_encode_in_portions(tokenizer, [piece for line in pieces for piece in line]))
    encoded = [[id_ for _ in line for id_ in next(found)] if len(line) > 1 else next(found) for line in pieces]
    eos, unk = tokenizer.eos_token_id, tokenizer.unk_token_id
    if unk in (None, eos):
        return encoded
    return [[unk if id_ == eos else id_ for id_ in ids] if eos in ids else ids for ids in encoded]


def split_long_line(line: str) -> list[str]:
    """Cut a line of more than `PORTION` characters before spaces between words, if there are such spaces."""
    pieces, start = [], 0
    while len(line) - start > PORTION and (cut := _CUT.search(line, start + PORTION)):
        pieces.append(line[start : cut.start()])
        start = cut.start()
    return [*pieces, line[start:]]


def _encode_in_portions(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    portion, size = [], 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= PORTION:
            yield from encode_as_text(tokenizer, portion)
            portion, size = [], 0
    if portion:
        yield from encode_as_text(tokenizer, portion)


def encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return token ids of each text, without special tokens; text that spells one is encoded as text.

    A tokenizer with the library's own call only computes ids, without offsets and dictionaries.

    Args:
        tokenizer: any tokenizer.
        texts: at least one text.
    """
    cls = type(tokenizer)
    if all(getattr(cls, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")):
        backend = tokenizer.backend_tokenizer  # the library's call resets these settings each time
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=True,
        truncation=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _cuts_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether cutting a text before a space between words leaves its tokens unchanged."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None or backend.pre_tokenizer is None:
        return False
    normalizer = backend.normalizer and json.loads(backend.normalizer.__getstate__())["type"]
    if normalizer not in (None, "Lowercase"):
        return False
    if any(" " in token.content for token in tokenizer.added_tokens_decoder.values()):
        return False
    parts = json.loads(backend.pre_tokenizer.__getstate__())
    if parts["type"] == "ByteLevel":
        return parts["use_regex"] and not parts["add_prefix_space"]
    return parts["type"] == "WhitespaceSplit"
