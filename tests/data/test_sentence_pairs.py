"""Sentence pairs from files and data sets: which are read, which are skipped and counted, which are refused."""

import gzip
import json
import lzma

import pytest

from moe_hf.data.pair_sources import PairSource
from moe_hf.data.sentence_pairs import load_sentence_pairs
from moe_hf.errors import InputError

EN = ["A dog.", "Two  cats", "„quoted“\u2028\x0c"]
DE = ["Ein Hund.", "Zwei Katzen", "Größe"]
PAIRS = list(zip(EN, DE))


@pytest.fixture
def file(tmp_path):
    def write(name, lines):
        path = tmp_path / name
        data = lines if isinstance(lines, bytes) else "".join(line + "\n" for line in lines).encode()
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wb") as stream:
            stream.write(data)
        return str(path)

    return write


@pytest.fixture
def load(tmp_path):
    """Load sources, each given by its fields, with a cache of this test only."""

    def load(*sources, **options):
        return load_sentence_pairs(
            [PairSource(**source) for source in sources], cache_dir=str(tmp_path / "cache"), **options
        )

    return load


def texts(pairs):
    return list(zip(pairs.dataset["source"], pairs.dataset["target"]))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_aligned_files_are_read_line_by_line(load, file, suffix):
    pairs = load({"source_files": file("a.en" + suffix, EN), "target_files": [file("a.de" + suffix, DE)]})
    assert texts(pairs) == PAIRS
    assert pairs.directions == [(None, None)] and pairs.tagged_languages == []
    assert (pairs.num_read, pairs.num_empty) == (3, 0)
    assert list(pairs.texts()) == EN + DE


@pytest.mark.parametrize("num_proc", [None, 2])
def test_several_files_are_paired_in_order(load, file, tmp_path, num_proc):
    for name, lines in {"1.en": EN[:1], "2.en": EN[1:], "1.de": DE[:1], "2.de": DE[1:]}.items():
        file(name, lines)
    source = {"source_files": [str(tmp_path / "*.en")], "target_files": [str(tmp_path / "*.de")]}
    assert texts(load(source, num_proc=num_proc)) == PAIRS


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_file_named_twice_is_read_twice(load, file, num_proc):
    one, other = file("1.en", EN[:1]), file("2.en", EN[1:2])
    german, further = file("1.de", DE[:1]), file("2.de", DE[1:2])
    upsampled = {"source_files": [one, one, other], "target_files": [german, german, further]}
    assert texts(load(upsampled, num_proc=num_proc)) == [PAIRS[0], PAIRS[0], PAIRS[1]]
    two_references = {"source_files": [one, one], "target_files": [german, further]}
    assert texts(load(two_references, num_proc=num_proc)) == [PAIRS[0], (EN[0], DE[1])]
    both = file("a.tsv", ["a\tb"])
    assert texts(load({"files": [both, both]}, num_proc=num_proc)) == [("a", "b")] * 2


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".tsv.xz"])
def test_tsv_has_both_sides(load, file, suffix):
    assert texts(load({"files": file("a" + suffix, ['A "dog"\tEin "Hund']), "source_language": "en"})) == [
        ('A "dog"', 'Ein "Hund')
    ]


def test_jsonl_has_both_sides(load, file):
    rows = [{"source": EN[0], "target": DE[0]}, {"translation": {"fr": "x", "de": DE[1], "en": EN[1]}}]
    path = file("a.jsonl.gz", [json.dumps(row) for row in rows])
    assert texts(load({"files": path, "source_language": "en", "target_language": "de"})) == PAIRS[:2]


def test_a_jsonl_pair_keeps_its_line_breaks(load, file):
    path = file("a.jsonl", [json.dumps({"source": "a\nb", "target": "c\r\nd"})])
    assert texts(load({"files": path})) == [("a\nb", "c\r\nd")]


@pytest.mark.parametrize("nested", [True, False])
def test_data_set_has_its_languages_in_a_mapping_or_in_columns(load, file, tmp_path, nested):
    (tmp_path / "hub").mkdir()
    rows = [{"en": en, "de": de} for en, de in [*PAIRS, (None, "leer")]]
    file("hub/train.jsonl", [json.dumps({"id": 1, "translation": row} if nested else row) for row in rows])
    source = {"dataset_name": str(tmp_path / "hub"), "source_language": "de", "target_language": "en"}
    pairs = load(source)
    assert texts(pairs) == [(de, en) for en, de in PAIRS]
    assert pairs.num_empty == 1
    with pytest.raises(InputError, match="hub has no language 'cs', it has .*de"):
        load(source | {"target_language": "cs"})
    with pytest.raises(InputError, match="hub needs source_language and target_language"):
        load(source | {"target_language": None})


def test_pairs_with_an_empty_side_are_counted(load, file):
    source = {
        "source_files": file("a.en", ["a", "", " ", "\u00a0", "b"]),
        "target_files": file("a.de", ["x", "y", "", "z", "w"]),
    }
    for _ in range(2):  # also when they come from the cache
        pairs = load(source)
        assert texts(pairs) == [("a", "x"), ("b", "w")]
        assert (pairs.num_read, pairs.num_empty) == (5, 3)
        assert pairs.dataset["row"][:] == [0, 4]
    assert str(pairs) == "2 pairs, 3 of 5 left out as a side is empty"
    assert load({"files": file("b.tsv", ["a\tx", "", "b\t", "\ty"])}).num_empty == 3


def test_several_sources_keep_their_directions(load, file):
    en, de = file("a.en", EN), file("a.de", DE)
    forth = {"source_files": en, "target_files": de, "source_language": "en", "target_language": "de"}
    back = {"source_files": de, "target_files": en, "source_language": "de", "target_language": "en"}
    pairs = load(forth, back, forth, max_pairs=2)
    assert pairs.directions == [("en", "de"), ("de", "en")] and pairs.tagged_languages == ["de", "en"]
    assert pairs.dataset["direction"][:] == [0, 0, 1, 1, 0, 0]
    assert texts(pairs)[1:3] == [PAIRS[1], PAIRS[0][::-1]]
    with pytest.raises(InputError, match="several directions need source_language and target_language.*: en-de, de-?"):
        load(forth, back | {"target_language": None})


def test_a_changed_file_is_read_again(load, file):
    source = {"files": file("a.tsv", ["a\tb"])}
    load(source)
    file("a.tsv", ["longer\tb"])
    assert texts(load(source)) == [("longer", "b")]


@pytest.mark.parametrize(("num_en", "num_de"), [(3, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_unequal_numbers_of_lines_name_both_files(load, file, num_en, num_de, num_proc):
    source = {
        "source_files": [file("fine.en", EN), file("a.en", EN[:num_en])],
        "target_files": [file("fine.de", DE), file("a.de", DE[:num_de])],
    }
    with pytest.raises(InputError, match=f"a.en has {num_en} lines and .*a.de has {num_de}: aligned files"):
        load(source, num_proc=num_proc)


def test_unequal_numbers_of_files_are_an_error(load, file):
    en, de = file("a.en", EN), file("a.de", DE)
    with pytest.raises(InputError, match="are 2 files, target_files=.* are 1: they must be equally many"):
        load({"source_files": [en, file("b.en", EN)], "target_files": de})


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.tsv", ["a\tb", "no tab"], "a.tsv: line 2: 1 column, expected 2"),
        ("a.tsv", ["a\tb\tc"], "a.tsv: line 1: 3 columns, expected 2"),
        ("a.jsonl", ['{"source": "a", "target": "b"}', "{"], "a.jsonl: line 2: not JSON"),
        ("a.jsonl", ['{"source": "a"}'], "line 1: no text under the keys 'source' and 'target'"),
        ("a.jsonl", ['{"translation": {"en": "a", "de": null}}'], "line 1: no text under the keys 'en' and 'de'"),
        ("a.jsonl", ["[1, 2]"], "line 1: no text under"),
        ("a.jsonl", ['{"source": "\\ud83d", "target": "b"}'], "line 1: .*surrogates not allowed"),
        ("a.txt", ["a\tb"], "a.txt: files with both sides must be .tsv or .jsonl"),
        ("a.tsv", "a\tb\nna\u00efve\tb\n".encode("latin-1"), "a.tsv: line 2 is not UTF-8"),
        ("a.tsv", b"\n", "a.tsv: the file has no text"),
        ("a.tsv", ["a\t", "\tb"], "a.tsv: no pair has text on both sides, of 2 read"),
    ],
)
def test_bad_line_is_named(load, file, name, lines, message):
    with pytest.raises(InputError, match=message):
        load({"files": file(name, lines), "source_language": "en", "target_language": "de"})


def test_language_keys_need_languages(load, file):
    with pytest.raises(InputError, match='line 1: "translation" needs source_language and target_language'):
        load({"files": file("a.jsonl", ['{"translation": {"en": "a", "de": "b"}}']), "source_language": "en"})


def test_bad_options_are_named(load, file):
    with pytest.raises(InputError, match="max_pairs=0 must be at least 1"):
        load({"files": file("a.tsv", ["a\tb"])}, max_pairs=0)
    with pytest.raises(InputError, match="at least one source"):
        load()
