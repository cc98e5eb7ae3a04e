"""Files of random bytes and damaged pairs either give text or raise an `InputError` of one line naming the file."""

import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_hf.data.lines import read_lines
from moe_hf.data.pair_sources import PairSource
from moe_hf.data.sentence_pairs import load_sentence_pairs
from moe_hf.data.text import load_text_dataset
from moe_hf.errors import InputError

# The same examples in every run.
fuzz = settings(derandomize=True, deadline=None, database=None)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
# Contents of a damaged text file: text, line ends and marks of other encodings and formats.
PIECES = [
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"{",
    b'"',
    b"\xed\xa0\x80",
]
BYTES = st.lists(st.sampled_from(PIECES) | TEXT.map(str.encode) | st.binary(max_size=8), max_size=12).map(b"".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["source", "target", "translation", "en", "de"]) | TEXT, inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def check_message(error: InputError, name: str) -> None:
    message = str(error)
    assert name in message and "\n" not in message and len(message) < 600, message


@pytest.mark.parametrize("suffix", ["txt", "gz", "xz"])
@settings(fuzz, max_examples=200)
@given(content=BYTES, is_packed=st.booleans(), num_cut=st.integers(0, 9), flip=st.integers(0, 60))
def test_any_bytes_are_lines_or_refused(folder, suffix, content, is_packed, num_cut, flip):
    data = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix, bytes)(content) if is_packed else content
    data = bytearray(data[: len(data) - num_cut])
    if flip < len(data):
        data[flip] ^= 0x15
    path = folder / f"a.{suffix}"
    path.write_bytes(data)
    try:
        lines = list(read_lines(str(path)))
    except InputError as error:
        check_message(error, path.name)
        return
    assert any(map(str.strip, lines))
    if suffix == "txt":  # nothing is lost
        assert "\n".join(lines).encode() == data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(
            b"\n"
        ).removesuffix(b"\r")


@settings(fuzz, max_examples=30)
@given(content=BYTES)
def test_any_bytes_are_rows_of_text_or_refused(folder, content):
    path = folder / "a.txt"
    path.write_bytes(content)
    try:
        rows = load_text_dataset([str(path)], cache_dir=str(folder / "cache"))
    except InputError as error:
        check_message(error, path.name)
    else:
        assert list(rows["text"]) == list(read_lines(str(path)))


@settings(fuzz, max_examples=60)
@given(
    rows=st.lists(JSON.map(json.dumps) | TEXT.map(lambda text: text.replace("\n", " ")), min_size=1, max_size=3),
    first=st.tuples(TEXT, TEXT),
    languages=st.sampled_from([(None, None), ("en", "de"), ("en", None)]),
)
def test_any_json_lines_are_pairs_or_refused(folder, rows, first, languages):
    path = folder / "a.jsonl"
    path.write_text("\n".join([json.dumps(dict(zip(("source", "target"), first))), *rows]) + "\n", encoding="utf-8")
    source = PairSource(files=str(path), source_language=languages[0], target_language=languages[1])
    try:
        pairs = load_sentence_pairs([source], cache_dir=str(folder / "cache"))
    except InputError as error:
        check_message(error, path.name)
    else:
        assert pairs.num_read >= 1 + sum(bool(row.strip()) for row in rows)
        kept = list(zip(pairs.dataset["source"], pairs.dataset["target"]))
        assert (first in kept) == all(map(str.strip, first))


@settings(fuzz, max_examples=40)
@given(content=BYTES)
def test_any_bytes_are_tab_separated_pairs_or_refused(folder, content):
    path = folder / "a.tsv"
    path.write_bytes(b"a\tb\n" + content)
    try:
        pairs = load_sentence_pairs([PairSource(files=str(path))], cache_dir=str(folder / "cache"))
    except InputError as error:
        check_message(error, path.name)
    else:
        assert pairs.dataset[0]["source"] == "a" and pairs.num_read == len(list(read_lines(str(path))))
