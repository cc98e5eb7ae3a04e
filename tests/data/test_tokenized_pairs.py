"""Sentence pairs as token ids: tags, ends, lengths, and the policy for over-long pairs."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import moe_hf.data.tokenized_pairs as tokenized_pairs
from moe_hf.data.pair_sources import read_pair_sources
from moe_hf.data.sentence_pairs import load_sentence_pairs
from moe_hf.data.tokenized_pairs import column_to_numpy, leave_out_long_pairs, tokenize_pairs
from moe_hf.data.translation_tokenizers import encode_sources, train_translation_tokenizer
from moe_hf.errors import InputError

EN = ["a dog runs", "the <2de> cat", "x"]
DE = ["ein Hund läuft", "die Katze </s>", "y z"]


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "en").write_text("\n".join(EN))
    (tmp_path / "de").write_text("\n".join(DE))
    files = {"en": str(tmp_path / "en"), "de": str(tmp_path / "de")}
    sources = read_pair_sources([{"parallel_files": files}], "train_pairs")
    cache = str(tmp_path / "cache")
    return {
        "one": load_sentence_pairs(sources[:1], cache_dir=cache),
        "both": load_sentence_pairs(sources, cache_dir=cache),
    }


PLAIN = train_translation_tokenizer(EN + DE, vocab_size=300)
TAGGED = train_translation_tokenizer(EN + DE, vocab_size=300, languages=["de", "en"])


def test_both_sides_end_and_decode_to_the_text(pairs):
    dataset = tokenize_pairs(pairs["one"], PLAIN)
    assert PLAIN.batch_decode(dataset["input_ids"][:], skip_special_tokens=True) == EN
    assert PLAIN.batch_decode(dataset["labels"][:], skip_special_tokens=True) == DE
    for row in dataset:
        assert row["input_ids"].count(PLAIN.eos_token_id) == row["labels"].count(PLAIN.eos_token_id) == 1
        assert row["input_ids"][-1] == row["labels"][-1] == PLAIN.eos_token_id
        assert (row["source_length"], row["target_length"]) == (len(row["input_ids"]), len(row["labels"]))
    assert dataset["target_words"][:] == [4, 4, 3]


def test_sources_carry_the_tag_of_their_target_language(pairs):
    dataset = tokenize_pairs(pairs["both"], TAGGED, num_proc=2, batch_size=2)
    assert dataset["direction"][:] == [0, 0, 0, 1, 1, 1]
    assert dataset["input_ids"][:] == encode_sources(TAGGED, EN, "de") + encode_sources(TAGGED, DE, "en")
    assert tokenize_pairs(pairs["one"], TAGGED)["input_ids"][:] == encode_sources(TAGGED, EN, "de")


def test_directions_without_tags_are_an_error(pairs, tmp_path):
    with pytest.raises(InputError, match="there are 2 directions, but the tokenizer has no language tags"):
        tokenize_pairs(pairs["both"], PLAIN)
    other = train_translation_tokenizer(EN, vocab_size=300, languages=["fr", "de"])
    with pytest.raises(InputError, match="target_language='en' is unknown to the tokenizer, it knows fr, de"):
        tokenize_pairs(pairs["both"], other)
    (tmp_path / "a.tsv").write_text("a\tb\n")
    unnamed = load_sentence_pairs(read_pair_sources([{"files": str(tmp_path / "a.tsv")}], "x"))
    with pytest.raises(InputError, match="target_language is not given, the tokenizer has tags for de, en"):
        tokenize_pairs(unnamed, TAGGED)


def test_second_run_does_not_tokenise_again(pairs, monkeypatch):
    first = tokenize_pairs(pairs["one"], PLAIN)["labels"][:]
    monkeypatch.setattr(tokenized_pairs, "encode_texts", lambda *args: pytest.fail("tokenised again"))
    assert tokenize_pairs(pairs["one"], PLAIN)["labels"][:] == first


def test_over_long_pairs_are_left_out_and_counted(pairs):
    dataset = tokenize_pairs(pairs["one"], PLAIN)
    sources, targets = column_to_numpy(dataset, "source_length"), column_to_numpy(dataset, "target_length")
    kept, num_long = leave_out_long_pairs(dataset, max_source_length=int(sources[0]), max_target_length=None)
    assert kept["source_length"][:] == [n for n in sources if n <= sources[0]]
    assert num_long == 3 - len(kept) > 0
    kept, num_long = leave_out_long_pairs(dataset, None, int(targets[2]))
    assert (kept["target_length"][:], num_long) == ([targets[2]], 2)
    assert leave_out_long_pairs(dataset, None, None) == (dataset, 0)
    with pytest.raises(InputError, match="max_source_length=1, max_target_length=9 leave none of the 3 pairs"):
        leave_out_long_pairs(dataset, 1, 9)


def test_the_librarys_collator_pads_on_the_right(pairs):
    rows = tokenize_pairs(pairs["one"], PLAIN).select_columns(["input_ids", "labels"])
    batch = DataCollatorForSeq2Seq(PLAIN)([rows[0], rows[2]])
    ids, labels = rows[2]["input_ids"], rows[2]["labels"]
    width, target_width = len(rows[0]["input_ids"]), len(rows[0]["labels"])
    assert batch["input_ids"].shape == (2, width) and batch["labels"].shape == (2, target_width)
    assert batch["input_ids"][1].tolist() == ids + [PLAIN.pad_token_id] * (width - len(ids))
    assert batch["attention_mask"][1].tolist() == [1] * len(ids) + [0] * (width - len(ids))
    assert batch["labels"][1].tolist() == labels + [-100] * (target_width - len(labels))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
