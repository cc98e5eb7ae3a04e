"""The subword tokenizer of translation models, with one vocabulary for all languages, and language tags."""

import logging
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError
from .encoding import encode_as_text
from .tokenizers import load_tokenizer, require_text, train_bpe

logger = logging.getLogger(__name__)

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"


def train_translation_tokenizer(
    lines: Iterable[str], *, vocab_size: int, languages: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE for all languages together.

    A space is added before the first word, so that a word has the same tokens at any position; decoding removes the
    space. Every text is reproduced exactly: `decode(tokenizer(text).input_ids, skip_special_tokens=True) == text`.
    There are no unknown tokens, and text is not normalised.

    Special tokens come first: "<pad>" (0), "<s>" (1, the decoder's start), "</s>" (2, appended to every text), then
    the language tags. Text that spells a special token is encoded as text. Training cuts long words, see
    `train_tokenizer`.

    Args:
        lines: the text of all languages.
        vocab_size: maximal number of tokens, including special tokens.
        languages: languages that get a tag such as "<2de>" (Johnson et al., 2016), which `encode_sources` puts before
            a source.

    Raises:
        InputError: a language is not a plain name or is repeated, `vocab_size` is too small, or `lines` has no text.
    """
    for language in languages:
        if not re.fullmatch(r"\w+([-_.@]\w+)*", language):
            raise InputError(
                f"languages={list(languages)}: {language!r} is not a language name such as 'de' or 'pt-BR'"
            )
    if len(set(languages)) < len(languages):
        raise InputError(f"languages={list(languages)} has a language twice")
    special_tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *map(_tag, languages)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special_tokens) + len(alphabet):
        raise InputError(
            f"vocab_size={vocab_size} is too small, at least {len(special_tokens) + len(alphabet)} are needed: "
            f"{len(special_tokens)} special tokens and 256 bytes"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Prepend(" ")
    # ByteLevel separates letters from other signs, so that merged bytes can never spell a special token.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.encode_special_tokens = True
    train_bpe(backend, require_text(lines), trainer)
    eos = (EOS_TOKEN, special_tokens.index(EOS_TOKEN))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}", pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}", special_tokens=[eos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=None,
        extra_special_tokens=[_tag(language) for language in languages],
        split_special_tokens=True,  # "</s>" in a text is text
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def load_or_train_translation_tokenizer(
    name_or_path: str | None,
    lines: Iterable[str],
    *,
    vocab_size: int,
    languages: Sequence[str] = (),
    argument: str = "tokenizer_name_or_path",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or train one.

    Args:
        name_or_path: folder or Hub name of the tokenizer to load; None to train one.
        lines: as for `train_translation_tokenizer`.
        vocab_size: as for `train_translation_tokenizer`.
        languages: languages that the tokenizer has a tag for, or gets a tag for.
        argument: the argument's name in error messages.

    Raises:
        InputError: `load_translation_tokenizer` or `train_translation_tokenizer` raises it.
    """
    if name_or_path is None:
        logger.info(f"tokenizer: training on both sides of all pairs, for at most {vocab_size:,} tokens")
        return train_translation_tokenizer(lines, vocab_size=vocab_size, languages=languages)
    return load_translation_tokenizer(name_or_path, languages, argument)


def load_translation_tokenizer(
    name_or_path: str, languages: Sequence[str] = (), argument: str = "tokenizer_name_or_path"
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name_or_path: the tokenizer's folder or Hub name.
        languages: languages that the tokenizer must have a tag for.
        argument: the argument's name in error messages.

    Raises:
        InputError: the tokenizer cannot be loaded, or lacks a pad, bos or eos token, or a tag of `languages`.
    """
    tokenizer = load_tokenizer(name_or_path, argument)
    missing = [name for name in ("pad_token", "bos_token") if getattr(tokenizer, name) is None]
    if missing:
        raise InputError(f"{argument}={name_or_path}: the tokenizer has no {' and no '.join(missing)}")
    for language in languages:
        language_tag_id(tokenizer, language)
    return tokenizer


def known_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the target languages with a tag; empty for the tokenizer of a single language pair."""
    return [match[1] for token in tokenizer.all_special_tokens if (match := re.fullmatch("<2(.+)>", token))]


def language_tag_id(tokenizer: PreTrainedTokenizerBase, language: str) -> int:
    """Return the id of a target language's tag.

    Raises:
        InputError: the tokenizer does not have a tag for the language.
    """
    known = known_languages(tokenizer)
    if language not in known:
        raise InputError(
            f"target_language={language!r} is unknown to the tokenizer, "
            + (f"it knows {', '.join(known)}" if known else "which has no language tags")
        )
    return tokenizer.convert_tokens_to_ids(_tag(language))


def encode_sources(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], target_language: str | None = None
) -> list[list[int]]:
    """Return token ids of sentences to translate: the target language's tag if there are tags, the text, and "</s>".

    Args:
        tokenizer: the tokenizer of a translation model.
        sentences: non-empty texts.
        target_language: code of the language to translate into; None for a tokenizer without tags.

    Raises:
        InputError: a sentence is empty, the language does not have a tag, or it is missing although there are tags.
    """
    for number, sentence in enumerate(sentences, start=1):
        if not sentence.strip():
            raise InputError(f"sentence {number} of {len(sentences)} to translate is empty")
    known = known_languages(tokenizer)
    if known and target_language is None:
        raise InputError(f"target_language is not given, the tokenizer's are {', '.join(known)}")
    tag = [] if target_language is None else [language_tag_id(tokenizer, target_language)]
    return [tag + ids for ids in encode_texts(tokenizer, sentences)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids of each text and "</s>", without the special tokens that `tokenizer` would add.

    Raises:
        InputError: UTF-8 cannot encode a text, which has half of a surrogate pair.
    """
    if not texts:  # the library refuses an empty list
        return []
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text {number} of {len(texts)} is not Unicode text ({error})") from None
    return [ids + [tokenizer.eos_token_id] for ids in encode_as_text(tokenizer, list(texts))]


def _tag(language: str) -> str:
    return f"<2{language}>"
