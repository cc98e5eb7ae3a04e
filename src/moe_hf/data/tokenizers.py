"""Trains and loads word-level and byte-level BPE tokenizers."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError, first_line
from ..model_files import TOKENIZER_FILES, check_files
from .encoding import split_long_line

if TYPE_CHECKING:
    from datasets import Dataset  # slow to import, and not needed to load a tokenizer

logger = logging.getLogger(__name__)

EOS_TOKEN = "<eos>"
UNK_TOKEN = "<unk>"
SPECIAL_TOKENS = {"word": [EOS_TOKEN, UNK_TOKEN], "bpe": [EOS_TOKEN]}
# Maximal bytes of a word or a run of spaces in BPE training, and the number of its characters that are used.
LONGEST_WORD, MOST_OF_A_WORD = 1000, 100_000
# Runs of letters and digits, other signs or spaces that may have more bytes; a character has at most four.
_LONG_RUN = re.compile(r"\w{n}|(?:[^\w\s]|_){n}|\s{n}".replace("n", str(LONGEST_WORD // 4 - 1)))


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
        kind: "word" uses whitespace-separated words, the most frequent ones first. Other words, and a literal "<unk>",
            become "<unk>". A special token in the text counts only as a whole word, so a line has as many tokens as
            words. "bpe" is byte-level byte pair encoding, which reproduces every text exactly (except for case, with
            `lowercase`). BPE training cuts words of more than 1,000 bytes into parts, because its time grows with the
            square of a word's length. It uses only the first 100,000 characters of a word. A warning gives the number
            of such words. Encoding does not cut them.
        vocab_size: maximal number of tokens, including special tokens.
        lowercase: whether the tokenizer turns text to lower case.
        extra_special_tokens: further special tokens.

    Raises:
        InputError: `kind` is not known, `vocab_size` is too small, a special token is repeated, or `lines` has no
            text.
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
    argument: str = "tokenizer_name_or_path",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or train one on the column "text" of `dataset`, in batches.

    Args:
        name_or_path: folder or Hub name of the tokenizer to load; None to train one.
        dataset: the text to train on.
        kind: as for `train_tokenizer`. This argument and the next three only apply to a new tokenizer.
        vocab_size: as for `train_tokenizer`.
        lowercase: as for `train_tokenizer`.
        extra_special_tokens: as for `train_tokenizer`.
        argument: the argument's name in error messages.

    Raises:
        InputError: the tokenizer cannot be loaded or has no eos token, or `train_tokenizer` raises it.
    """
    if name_or_path is None:
        logger.info(f"tokenizer: training on {len(dataset):,} lines, for at most {vocab_size:,} tokens")
        return train_tokenizer(
            _iterate_text(dataset),
            kind=kind,
            vocab_size=vocab_size,
            lowercase=lowercase,
            extra_special_tokens=extra_special_tokens,
        )
    return load_tokenizer(name_or_path, argument)


def load_tokenizer(name_or_path: str, argument: str = "tokenizer_name_or_path") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Args:
        name_or_path: the folder or name.
        argument: the argument's name in error messages.

    Raises:
        InputError: the tokenizer cannot be loaded, needs code that would be run, or has no eos token.
    """
    try:
        check_files(name_or_path, ("config.json", *TOKENIZER_FILES))
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length={tokenizer.model_max_length!r} in its files is not a number")
    except Exception as error:  # a damaged tokenizer.json raises a plain Exception
        reason = _why_not_loaded(name_or_path, error)
        raise InputError(f"{argument}={name_or_path}: the tokenizer cannot be loaded ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{argument}={name_or_path}: the tokenizer has no eos_token, one is needed")
    return tokenizer


def _why_not_loaded(name_or_path: str, error: Exception) -> str:
    """Return the reason of an error, and the file at fault, which the libraries do not name."""
    file, reason = Path(name_or_path, "tokenizer.json"), first_line(error) or type(error).__name__
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run here"
    if not Path(name_or_path).exists():
        return f"there is no such folder; as a Hub name: {reason}"
    if not file.exists():
        return f"without tokenizer.json: {reason}"
    try:
        Tokenizer.from_file(str(file))
    except Exception as broken:
        return f"tokenizer.json is not a tokenizer: {broken}"
    if isinstance(error, LookupError | AttributeError | TypeError):  # the message is a name from the library's code
        return f"a value in tokenizer_config.json or config.json has the wrong type, {type(error).__name__}: {reason}"
    return reason


def _iterate_text(dataset: "Dataset") -> Iterator[str]:
    for batch in dataset.iter(batch_size=1000):
        yield from batch["text"]


def require_text(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines unchanged.

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
    trainer = trainers.BpeTrainer(  # its progress bars would mix with messages
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    train_bpe(backend, (piece for line in lines for piece in split_long_line(line)), trainer)
    return backend


def train_bpe(backend: Tokenizer, lines: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Train byte-level BPE in a time that does not grow with the square of a word's length.

    A word of more than `LONGEST_WORD` bytes is cut into parts of that length. Only its first `MOST_OF_A_WORD`
    characters are used.

    Args:
        backend: the tokenizer to train; its pre-tokenizer is `ByteLevel` without a prefix space.
        lines: the text.
        trainer: the settings of the training.
    """
    words, num_long = backend.pre_tokenizer, 0

    def shortened() -> Iterator[str]:
        nonlocal num_long
        for line in lines:
            start = 0
            for word, (first, end) in words.pre_tokenize_str(line) if _may_have_long_word(line) else ():
                num_long += len(word) > LONGEST_WORD
                if end - first > MOST_OF_A_WORD:
                    yield line[start : first + MOST_OF_A_WORD]
                    start = end
            yield line[start:]

    # ByteLevel turns each byte into a character.
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    backend.train_from_iterator(shortened(), trainer)
    backend.pre_tokenizer = words
    if num_long:
        were = "1 word of the text was" if num_long == 1 else f"{num_long:,} words of the text were"
        logger.warning(
            f"tokenizer: {were} cut into parts of {LONGEST_WORD:,} bytes for its training, as longer ones take too "
            "long; the text that the model reads is not cut"
        )


def _may_have_long_word(line: str) -> bool:
    """Return whether a word may be longer than `LONGEST_WORD`. Checking windows first is faster than `_LONG_RUN`."""
    step = LONGEST_WORD // 8 - 1  # a long run covers a whole window of that many characters
    windows = (line[start : start + step] for start in range(0, len(line) - step + 1, step))
    return any(" " not in window or window.isspace() for window in windows) and bool(_LONG_RUN.search(line))
