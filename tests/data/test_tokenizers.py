"""Trained tokenizers: vocabularies, round trips, saving and loading."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from moe_hf.data import tokenizers
from moe_hf.data.tokenizers import load_or_train_tokenizer, train_tokenizer
from moe_hf.errors import InputError

LINES = [" the cat saw the <unk> \u00e9t\u00e9 ", "", "The the cat a<unk>b <eos> 42", "saw"]
SAMPLES = [*LINES, "unseen  words\twith\n newline \U0001f642", "<eos><unk>"]
BPE = train_tokenizer(LINES, kind="bpe", vocab_size=270)


def train(kind, **options):
    return train_tokenizer(LINES, **{"kind": kind, "vocab_size": 300} | options)


def test_word_ids_fall_with_frequency_after_the_special_tokens():
    vocabulary = train("word").get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.get)
    assert by_id == ["<eos>", "<unk>", "the", "cat", "saw", "42", "The", "a<unk>b", "\u00e9t\u00e9"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_rare_words_and_literal_unk_are_unk():
    tokenizer = train("word", vocab_size=4)
    assert len(tokenizer) == 4
    assert tokenizer("the <unk> cat\u00a0saw  <eos>")["input_ids"] == [2, 1, 3, 1, 0]


def test_word_decoding_joins_with_one_space():
    tokenizer = train("word")
    assert tokenizer.decode(tokenizer(" the\tcat  saw ,")["input_ids"]) == "the cat saw <unk>"


@settings(deadline=None)
@given(words=st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1) | st.just("a<eos>b")))
def test_word_tokenizer_gives_one_token_a_word(words):
    assert len(WORD(" ".join(words))["input_ids"]) == len(words)


WORD = train("word")


def test_lowercase_merges_words():
    vocabulary = train("word", lowercase=True).get_vocab()
    assert "The" not in vocabulary
    assert train("word", lowercase=True)("THE \u00c9T\u00c9")["input_ids"] == [
        vocabulary["the"],
        vocabulary["\u00e9t\u00e9"],
    ]
    bpe = train("bpe", lowercase=True)
    assert bpe.decode(bpe("THE Cat")["input_ids"]) == "the cat"


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_round_trips_through_bpe(text):
    assert BPE.decode(BPE(text)["input_ids"]) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_spaces_accents_emoji_and_line_breaks_round_trip_through_bpe(text):
    assert BPE.decode(BPE(text)["input_ids"]) == text


def test_bpe_learns_merges_up_to_the_vocabulary_size():
    assert len(BPE) == 270
    assert len(BPE(" the cat")["input_ids"]) < len(" the cat")


@pytest.mark.parametrize(
    ("kind", "first"), [("word", ["<eos>", "<unk>", "<a>", "<b>"]), ("bpe", ["<eos>", "<a>", "<b>"])]
)
def test_special_tokens_come_first(kind, first):
    tokenizer = train(kind, extra_special_tokens=["<a>", "<b>"])
    assert tokenizer.convert_ids_to_tokens(list(range(len(first)))) == first
    assert set(tokenizer.all_special_tokens) == set(first)
    assert tokenizer("<b>")["input_ids"] == [len(first) - 1]
    assert tokenizer.decode([0, *range(len(first))], skip_special_tokens=True).strip() == ""


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_saved_tokenizer_loads_identically(kind, tmp_path):
    tokenizer = train(kind, extra_special_tokens=["<a>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, loaded):
        assert (each.eos_token_id, each.pad_token_id, each.bos_token) == (0, 0, None)
        assert each.unk_token_id == (1 if kind == "word" else None)
        assert each.model_input_names == ["input_ids", "attention_mask"]
        assert each.clean_up_tokenization_spaces is False
        assert each.padding_side == "left"
        assert list(each.extra_special_tokens) == ["<a>"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    samples = [*SAMPLES, "x <a> y<a>"]
    assert loaded(samples)["input_ids"] == tokenizer(samples)["input_ids"]
    assert dict(loaded(samples, padding=True)) == dict(tokenizer(samples, padding=True))
    ids = tokenizer(samples)["input_ids"]
    assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "char"}, "kind='char' is unknown, allowed are 'word', 'bpe'"),
        ({"kind": "word", "vocab_size": 2}, "vocab_size=2 is too small, at least 3"),
        ({"kind": "bpe", "vocab_size": 256}, "vocab_size=256 is too small, at least 257"),
        ({"kind": "word", "extra_special_tokens": ["<unk>"]}, "extra_special_tokens=.*twice"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        train(**options)


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("lines", [[], ["", " \t"]])
def test_no_text_is_an_input_error(kind, lines):
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(lines, kind=kind, vocab_size=300)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_smallest_vocabulary_is_allowed(kind):
    smallest = {"word": 3, "bpe": 257}[kind]
    assert len(train(kind, vocab_size=smallest)) == smallest


def test_tokenizer_is_trained_on_the_dataset_or_loaded(tmp_path):
    dataset = Dataset.from_dict({"text": LINES})
    trained = load_or_train_tokenizer(None, dataset, kind="word", vocab_size=300, lowercase=True)
    assert trained.get_vocab() == train("word", lowercase=True).get_vocab()
    trained.save_pretrained(tmp_path)
    other_text = Dataset.from_dict({"text": ["other"]})
    loaded = load_or_train_tokenizer(str(tmp_path), other_text, kind="bpe", vocab_size=300)
    assert loaded.get_vocab() == trained.get_vocab()


def test_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    dataset = Dataset.from_dict({"text": LINES})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name in ("missing", "broken"):
        with pytest.raises(InputError, match=f"{name}.*cannot be loaded") as caught:
            load_or_train_tokenizer(str(tmp_path / name), dataset, kind="word", vocab_size=300)
        assert "\n" not in str(caught.value)


def test_loaded_tokenizer_needs_eos(tmp_path):
    tokenizer = train("word")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no eos_token"):
        load_or_train_tokenizer(str(tmp_path), Dataset.from_dict({"text": LINES}), kind="word", vocab_size=300)


WORDS = ["ab" * 500, "\u00e9" * 500, "!" * 1000, " " * 1000, "the cat's 42 " * 200]


def test_words_up_to_the_limit_are_trained_on_whole(caplog):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(WORDS, trainer)
    trained = json.loads(train_tokenizer(WORDS, kind="bpe", vocab_size=290).backend_tokenizer.to_str())
    assert trained["model"] == json.loads(backend.to_str())["model"]
    assert trained["pre_tokenizer"] == json.loads(backend.to_str())["pre_tokenizer"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("lines", "counted"),
    [
        ([*WORDS, "a" * 1001], "1 word of the text was cut"),
        (["b " + "\u00e9" * 501 + " b", " " * 1002 + "a", "a!" * 999], "2 words of the text were cut"),
        (["a" * 300_000 + " " + "b" * 300_000], "2 words of the text were cut"),
    ],
)
def test_longer_words_are_counted_and_encoded_whole(lines, counted, caplog):
    tokenizer = train_tokenizer(lines, kind="bpe", vocab_size=270)
    (record,) = caplog.records
    assert counted in record.message and "1,000 bytes" in record.message
    assert tokenizer.decode(tokenizer(lines[-1], verbose=False)["input_ids"]) == lines[-1]


def test_what_follows_a_very_long_word_is_trained_on(monkeypatch):
    monkeypatch.setattr(tokenizers, "MOST_OF_A_WORD", 2000)
    trained = train_tokenizer(["z" * 9000 + " cat cat " + "y" * 9000 + "! cat"], kind="bpe", vocab_size=300)
    assert "\u0120cat" in trained.get_vocab()


SIGNS = ["a", "\u00e9", "\U0001f642", "\u0301", "_", "!", "1", " ", "\t", "\u3000", "\u00bd", "\u4e2d"]
RUNS = st.tuples(
    st.lists(st.sampled_from(SIGNS), min_size=1, max_size=2), st.sampled_from([3, 130, 250, 333, 501, 1001])
)


@settings(deadline=None)
@given(runs=st.lists(RUNS, min_size=1, max_size=4), gap=st.sampled_from(["", " "]))
def test_no_long_word_is_overlooked(runs, gap):
    line = gap.join(("".join(signs) * length)[:length] for signs, length in runs)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(line)
    if any(len(word) > tokenizers.LONGEST_WORD for word, _ in words):
        assert tokenizers._may_have_long_word(line)
