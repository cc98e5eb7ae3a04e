"""Lines to token ids: text that spells special tokens stays text, and long lines are encoded in portions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_hf.data import encoding
from moe_hf.data.encoding import encode_lines, split_long_line
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.data.translation_tokenizers import train_translation_tokenizer

LINES = ["the cat <unk> saw <eos>", "a<eos>b <pad>", "", "the dog"]
SIZES = {"word": 300, "bpe": 300}
TOKENIZERS = {kind: train_tokenizer(LINES, kind=kind, vocab_size=size) for kind, size in SIZES.items()}
TRANSLATION = train_translation_tokenizer(LINES, vocab_size=300)
# Text that makes cuts difficult: spaces of all kinds next to letters, signs and contractions.
TEXT = st.lists(
    st.sampled_from([" ", "  ", "\t", "\u00a0", "\u3000", "it's", "x", "12", "!", "É", "<eos>", "🙂"]), max_size=40
)


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_the_end_symbol_never_arises_from_text(split_special_tokens):
    for kind, tokenizer in TOKENIZERS.items():
        tokenizer.split_special_tokens = split_special_tokens  # an older tokenizer.json says False
        encoded = encode_lines(tokenizer, LINES)
        assert not any(tokenizer.eos_token_id in ids for ids in encoded), kind
    assert [tokenizer.decode(ids) for ids in encoded] == LINES  # of bytes
    words = TOKENIZERS["word"].get_vocab()
    assert encode_lines(TOKENIZERS["word"], LINES[:1]) == [
        [words[word] for word in ("the", "cat", "<unk>", "saw", "<unk>")]
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ordinary_text_has_the_ids_of_the_tokenizer(kind):
    lines = (
        ["the cat saw", "", " a  dog ", "it's <unk>"] if kind == "word" else ["the cat saw", "", " a  dog ", "it's"]
    )
    assert encode_lines(TOKENIZERS[kind], lines) == TOKENIZERS[kind](lines)["input_ids"]


@settings(deadline=None)
@given(lines=st.lists(TEXT.map("".join), max_size=4), portion=st.integers(1, 30))
def test_portions_change_nothing(lines, portion):
    for tokenizer in (*TOKENIZERS.values(), TRANSLATION):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "PORTION", 10**6)
            whole = encode_lines(tokenizer, lines)
            patch.setattr(encoding, "PORTION", portion)
            assert encode_lines(tokenizer, lines) == whole


def test_a_long_line_is_cut_between_words(monkeypatch):
    monkeypatch.setattr(encoding, "PORTION", 5)
    assert split_long_line("one two three  four five") == ["one two", " three  four", " five"]
    assert split_long_line("abcdefghijklm") == ["abcdefghijklm"]


def test_a_tokenizer_that_marks_the_start_of_a_text_reads_it_whole(monkeypatch):
    monkeypatch.setattr(encoding, "PORTION", 3)
    line = "the cat saw the dog"
    assert encode_lines(TRANSLATION, [line]) == [TRANSLATION(line, add_special_tokens=False)["input_ids"]]
