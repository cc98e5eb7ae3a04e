"""Training of word-level and byte-level BPE tokenizers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset  # slow to import, and not needed to load a tokenizer

EOS_TOKEN = "<eos>"
UNK_TOKEN = "<unk>"
SPECIAL_TOKENS = {"word": [EOS_TOKEN, UNK_TOKEN], "bpe": [EOS_TOKEN]}


def train_tokenizer(
    lines: Iterable[str],
    *,
    kind: Literal["word", "bpe"],
    vocab_size: int,
    lowercase: bool = False,
    extra_special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Special tokens come first: "<eos>" (0, which also pads), "<unk>" ("word" only), then `extra_special_tokens`.

    Args:
        lines: the text.
        kind: "word" takes whitespace-separated words, the most frequent ones first; others are "<unk>", and so is a
            literal "<unk>". A special token in the text counts only as a whole word, so a line has as many tokens as
            words. "bpe" is byte-level byte pair encoding, with which every text round-trips (but for case, with
            `lowercase`).
        vocab_size: tokens at most, special tokens included.
        lowercase: whether the tokenizer turns text to lower case.
        extra_special_tokens: further special tokens.

    Raises:
        InputError: unknown `kind`, `vocab_size` too small, a special token given twice, no text in `lines`.
    """
    if kind not in SPECIAL_TOKENS:
        raise InputError(f"kind={kind!r} is unknown, allowed are {', '.join(map(repr, SPECIAL_TOKENS))}")
    special_tokens = [*SPECIAL_TOKENS[kind], *extra_special_tokens]
    if len(set(special_tokens)) < len(special_tokens):
        raise InputError(f"extra_special_tokens={list(extra_special_tokens)}: twice in the list {special_tokens}")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bpe" else []
    smallest = len(special_tokens) + (len(alphabet) or 1)
    if vocab_size < smallest:
        parts = "the special tokens and " + ("256 bytes" if kind == "bpe" else "one word")
        raise InputError(f"vocab_size={vocab_size} is too small, at least {smallest} are needed: {parts}")
    normalizer = normalizers.Lowercase() if lowercase else None
    lines = require_text(lines)
    if kind == "word":
        backend = _train_word_level(lines, normalizer, vocab_size, special_tokens)
    else:
        backend = _train_byte_level_bpe(lines, normalizer, vocab_size, special_tokens, alphabet)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=None,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        unk_token=UNK_TOKEN if kind == "word" else None,
        extra_special_tokens=list(extra_special_tokens),
        split_special_tokens=kind == "word",  # "a<unk>b" is one word and one token
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_or_train_tokenizer(
    name_or_path: str | None,
    dataset: "Dataset",
    *,
    kind: Literal["word", "bpe"],
    vocab_size: int,
    lowercase: bool = False,
    extra_special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or train one on the column "text" of `dataset`, in batches.

    Args:
        name_or_path: folder or Hub name of the tokenizer to load; None to train one.
        dataset: the text to train on.
        kind: as for `train_tokenizer`; not used for a loaded tokenizer, nor are the following arguments.
        vocab_size: as for `train_tokenizer`.
        lowercase: as for `train_tokenizer`.
        extra_special_tokens: as for `train_tokenizer`.

    Raises:
        InputError: the tokenizer cannot be loaded or has no eos token; and the errors of `train_tokenizer`.
    """
    if name_or_path is None:
        return train_tokenizer(
            _iterate_text(dataset),
            kind=kind,
            vocab_size=vocab_size,
            lowercase=lowercase,
            extra_special_tokens=extra_special_tokens,
        )
    return load_tokenizer(name_or_path)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        InputError: it cannot be loaded or has no eos token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"name_or_path={name_or_path!r}: the tokenizer cannot be loaded ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"name_or_path={name_or_path!r}: the tokenizer has no eos_token, one is needed")
    return tokenizer


def _iterate_text(dataset: "Dataset") -> Iterator[str]:
    for batch in dataset.iter(batch_size=1000):
        yield from batch["text"]


def require_text(lines: Iterable[str]) -> Iterator[str]:
    """Yield the same lines.

    Raises:
        InputError: no line has text.
    """
    lines = iter(lines)
    for line in lines:
        if line.strip():
            return chain([line], lines)
    raise InputError("lines: no text to train a tokenizer on, at least one word is needed")


def _train_word_level(lines, normalizer, vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    counts = Counter()
    for line in lines:
        counts.update((normalizer.normalize_str(line) if normalizer else line).split())
    words = sorted(counts.keys() - set(special_tokens), key=lambda word: (-counts[word], word))
    vocabulary = [*special_tokens, *words][:vocab_size]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer:
        backend.normalizer = normalizer
    return backend


def _train_byte_level_bpe(lines, normalizer, vocab_size: int, special_tokens: list[str], alphabet) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(  # its own progress bars would share lines with messages
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    return backend
