"""The tokenizer of translation models: exact round trips, language tags, text that spells a special token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.data.translation_tokenizers import (
    encode_sources,
    encode_texts,
    known_languages,
    language_tag_id,
    load_or_train_translation_tokenizer,
    train_translation_tokenizer,
)
from moe_hf.errors import InputError

LINES = ["A dog runs.", "Ein Hund läuft.", "the dog </s> <2de> <pad> <s> the <2de>"] * 5
SAMPLES = [
    "žluťoučký „kůň“ pěl ďábelské ódy",
    "Größe, Öl und Übermut: »ß«",
    "« L'été », c’est déjà fini ?",
    "  two  spaces\tand\nlines \u00a0\u2028 ",
    "no-break▁sign e\u0301 <0x41> ## 🙂\x00",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<2de>", "<2fr>"]
PAIR = train_translation_tokenizer(LINES, vocab_size=300)
MANY = train_translation_tokenizer(LINES, vocab_size=300, languages=["de", "fr"])


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")) | st.lists(st.sampled_from([*SPECIAL, " ", "x"])).map("".join))
def test_any_text_round_trips(text):
    ids = MANY(text)["input_ids"]
    assert decode(MANY, ids) == text
    assert ids[-1] == 2 and all(id_ >= len(SPECIAL) for id_ in ids[:-1])


@pytest.mark.parametrize("text", ["", " ", *LINES[:3], *SAMPLES, *SPECIAL])
def test_accents_quotes_spaces_and_spelled_special_tokens_round_trip(text):
    for tokenizer in (PAIR, MANY):
        assert decode(tokenizer, tokenizer(text)["input_ids"]) == text
        assert decode(tokenizer, encode_texts(tokenizer, [text])[0]) == text


def test_a_word_has_the_same_tokens_at_the_start():
    assert PAIR.tokenize("dog")[0] == PAIR.tokenize("the dog")[-1]


def test_special_tokens_come_first():
    assert MANY.convert_ids_to_tokens(list(range(5))) == SPECIAL
    assert (MANY.pad_token_id, MANY.bos_token_id, MANY.eos_token_id, MANY.unk_token) == (0, 1, 2, None)
    assert known_languages(MANY) == ["de", "fr"] and known_languages(PAIR) == []
    assert len(MANY) <= 300


def test_saved_tokenizer_loads_identically(tmp_path):
    MANY.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == MANY.get_vocab()
    texts = [*LINES, *SAMPLES, *SPECIAL, ""]
    assert dict(loaded(texts, padding=True)) == dict(MANY(texts, padding=True))
    assert loaded.padding_side == "right"
    assert known_languages(loaded) == ["de", "fr"]
    assert [decode(loaded, ids) for ids in loaded(texts)["input_ids"]] == texts
    assert encode_sources(loaded, SAMPLES, "fr") == encode_sources(MANY, SAMPLES, "fr")
    again = load_or_train_translation_tokenizer(str(tmp_path), [], vocab_size=1, languages=["fr"])
    assert again.get_vocab() == MANY.get_vocab()


def test_target_language_is_named_in_front_of_the_source():
    (ids,) = encode_sources(MANY, ["the dog"], "fr")
    assert ids == [4, *MANY("the dog")["input_ids"]]
    assert encode_sources(PAIR, ["the dog"]) == [PAIR("the dog")["input_ids"]]


def test_unknown_language_is_named():
    with pytest.raises(InputError, match="target_language='cs' is unknown to the tokenizer, it knows de, fr"):
        encode_sources(MANY, ["the dog"], "cs")
    with pytest.raises(InputError, match="'pad'.*it knows de, fr"):
        language_tag_id(MANY, "pad")
    with pytest.raises(InputError, match="target_language is not given, the tokenizer's are de, fr"):
        encode_sources(MANY, ["the dog"])
    with pytest.raises(InputError, match="target_language='de'.*no language tags"):
        encode_sources(PAIR, ["the dog"], "de")


@pytest.mark.parametrize("sentence", ["", " \t"])
def test_empty_source_is_an_error(sentence):
    with pytest.raises(InputError, match="sentence 2 of 3 to translate is empty"):
        encode_sources(PAIR, ["the dog", sentence, "a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ["de", "a>b"]}, "'a>b' is not a language name"),
        ({"languages": [""]}, "'' is not a language name"),
        ({"languages": ["de", "de"]}, "has a language twice"),
        ({"vocab_size": 258}, "vocab_size=258 is too small, at least 259 .*3 special tokens and 256 bytes"),
        ({"vocab_size": 260, "languages": ["de", "fr"]}, "at least 261"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        train_translation_tokenizer(LINES, **{"vocab_size": 300} | options)


def test_no_text_is_an_error():
    with pytest.raises(InputError, match="no text"):
        train_translation_tokenizer(["", " "], vocab_size=300)


def test_loaded_tokenizer_must_fit(tmp_path):
    PAIR.save_pretrained(tmp_path / "pair")
    with pytest.raises(InputError, match="target_language='de'.*no language tags"):
        load_or_train_translation_tokenizer(str(tmp_path / "pair"), [], vocab_size=1, languages=["de"])
    train_tokenizer(LINES, kind="bpe", vocab_size=300).save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match="lm: the tokenizer has no bos_token"):
        load_or_train_translation_tokenizer(str(tmp_path / "lm"), [], vocab_size=1)
