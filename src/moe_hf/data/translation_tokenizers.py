"""The subword tokenizer of translation models: one vocabulary for all languages, exact round trips, language tags."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError
from .encoding import encode_as_text
from .tokenizers import load_tokenizer, require_text, train_bpe

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"


def train_translation_tokenizer(
    lines: Iterable[str], *, vocab_size: int, languages: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE for all languages together.

    A space is put before the first word, so that a word has the same tokens there as anywhere else; decoding takes it
    away again. Every text round-trips exactly, `decode(tokenizer(text).input_ids, skip_special_tokens=True) == text`;
    there is no unknown token and no normalisation. Special tokens come first: "<pad>" (0), "<s>" (1, with which a
    decoder starts), "</s>" (2, appended to every text), then the languages' tags. None of them arises from text that
    spells it. Training cuts long words, as `train_tokenizer` tells.

    Args:
        lines: the text of all languages.
        vocab_size: tokens at most, special tokens included.
        languages: each gets a tag such as "<2de>" (Johnson et al., 2016), which `encode_sources` puts before a source.

    Raises:
        InputError: a language that is not a plain name or given twice, `vocab_size` too small, no text in `lines`.
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
    # It parts letters from other signs, so that no merge of bytes can spell a special token.
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
        languages: those that the tokenizer has, or gets, a tag for.
        argument: the argument's name in error messages.

    Raises:
        InputError: the errors of `load_translation_tokenizer` and `train_translation_tokenizer`.
    """
    if name_or_path is None:
        return train_translation_tokenizer(lines, vocab_size=vocab_size, languages=languages)
    return load_translation_tokenizer(name_or_path, languages, argument)


def load_translation_tokenizer(
    name_or_path: str, languages: Sequence[str] = (), argument: str = "tokenizer_name_or_path"
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name_or_path: its folder or Hub name.
        languages: those that it has to have a tag for.
        argument: the argument's name in error messages.

    Raises:
        InputError: it cannot be loaded, has no pad, bos or eos token, or no tag for one of `languages`.
    """
    tokenizer = load_tokenizer(name_or_path, argument)
    missing = [name for name in ("pad_token", "bos_token") if getattr(tokenizer, name) is None]
    if missing:
        raise InputError(f"{argument}={name_or_path}: the tokenizer has no {' and no '.join(missing)}")
    for language in languages:
        language_tag_id(tokenizer, language)
    return tokenizer


def known_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The target languages for which `tokenizer` has a tag; empty for the tokenizer of a single language pair."""
    return [match[1] for token in tokenizer.all_special_tokens if (match := re.fullmatch("<2(.+)>", token))]


def language_tag_id(tokenizer: PreTrainedTokenizerBase, language: str) -> int:
    """The id of the tag of a target language.

    Raises:
        InputError: `tokenizer` has no such tag.
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
    """Token ids of sentences to translate: the tag of the target language if there are tags, the text, "</s>".

    Args:
        tokenizer: of a translation model.
        sentences: the texts, none of them empty.
        target_language: code of the language to translate into; None for a tokenizer without tags.

    Raises:
        InputError: an empty sentence; a language that `tokenizer` has no tag for, or none where it has tags.
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
    """Token ids of each text and "</s>", whatever special tokens `tokenizer` adds by itself.

    Raises:
        InputError: a text that UTF-8 cannot write, with half of a surrogate pair.
    """
    if not texts:  # which the library refuses
        return []
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text {number} of {len(texts)} is no Unicode text ({error})") from None
    return [ids + [tokenizer.eos_token_id] for ids in encode_as_text(tokenizer, list(texts))]


def _tag(language: str) -> str:
    return f"<2{language}>"
