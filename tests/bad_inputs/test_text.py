"""Malformed text and sentence pairs."""

import bz2
import gzip
import json
import lzma
import os
import random
import socket
import string
from contextlib import closing

import pandas as pd
import pytest
from bad_inputs import Case, Place, judge

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
TEXT = "one two three\n" * 30
NESTED = "[" * 100_000


def lm(name: str, content: str | bytes):
    """Train a language model on one file."""
    return lambda place: ["train-lm", place.lm_config(train_files=[str(place.file(name, content))])]


def lm_of(make, **changes):
    """Train a language model on the path that `make` makes."""
    return lambda place: ["train-lm", place.lm_config(train_files=[str(make(place))], **changes)]


def validation_of(make):
    """Train a language model that is to be evaluated on the path that `make` makes."""

    def command(place):
        files = {"train_files": [str(place.file("train.txt", TEXT))], "validation_files": [str(make(place))]}
        return ["train-lm", place.lm_config(**files)]

    return command


def pairs(name: str, content: str | bytes, **languages):
    """Train a translation model on one file of both sides."""
    none = {"train_source_files": None, "train_target_files": None}
    return lambda place: [
        "train-translation",
        place.translation_config(train_files=[str(place.file(name, content))], **none | languages),
    ]


def aligned(source: str | bytes, target: str | bytes):
    """Train a translation model on two files."""

    def command(place):
        files = {"source": place.file("a.en", source), "target": place.file("a.de", target)}
        named = {f"train_{side}_files": [str(file)] for side, file in files.items()}
        return ["train-translation", place.translation_config(**named)]

    return command


def lm_dataset(name: str, write, **changes):
    """Train a language model on a folder of data with the file that `write` writes."""

    def command(place):
        write(place.file(f"data/{name}", ""))
        files = {"train_files": None, "validation_files": None, "validation_split": None}
        return ["train-lm", place.lm_config(dataset_name=str(place / "data"), **files | changes)]

    return command


def pairs_dataset(name: str, write, **changes):
    """The same of a translation model."""

    def command(place):
        write(place.file(f"data/{name}", ""))
        none = {"train_source_files": None, "train_target_files": None, "validation_split": None}
        return ["train-translation", place.translation_config(dataset_name=str(place / "data"), **none | changes)]

    return command


def evaluate(name: str, content: str | bytes):
    return lambda place: ["evaluate-lm", place.lm(), place.file(name, content)]


def translate(name: str, content: str | bytes):
    return lambda place: ["translate", place.translator(), place.file(name, content), "--num_beams", "1"]


def fifo(place: Place):
    os.mkfifo(place / "pipe")
    return place / "pipe"


def a_socket(place: Place):
    with closing(socket.socket(socket.AF_UNIX)) as end:
        end.bind(str(place / "socket"))
    return place / "socket"


def link_to_nothing(place: Place):
    (place / "link.txt").symlink_to(place / "gone.txt")
    return place / "link.txt"


def folder(place: Place):
    place.file("folder/a.txt", TEXT)
    return place / "folder"


def jsonl(*rows):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(**columns):
    return lambda path: pd.DataFrame(columns).to_parquet(path)


def without_spaces(num_bytes: int) -> str:
    return "".join(random.Random(0).choices(string.ascii_lowercase, k=num_bytes)) + "\n"


def lm_bpe(text: str):
    """Train a language model for one step with a tokenizer of byte pairs that is trained on the text."""
    options = {"tokenizer_kind": "bpe", "vocab_size": 300, "max_steps": 1, "validation_files": None}
    return lm_of(lambda place: place.file("long.txt", text), **options)


def translation_of_long(place: Place):
    text = without_spaces(200_000)
    files = {f"train_{side}_files": [str(place.file(f"a.{side}", f"a\n{text}"))] for side in ("source", "target")}
    return ["train-translation", place.translation_config(max_source_length=9, max_steps=1, **files)]


EN_DE = {"source": "a", "target": "b"}
CASES = [
    # Encodings and kinds of file.
    Case("UTF-16 with its mark", lm("a.txt", TEXT.encode("utf-16")), ("a.txt", "UTF-16", "iconv")),
    Case("UTF-16 without a mark", lm("a.txt", TEXT.encode("utf-16-le")), ("a.txt", "UTF-16", "iconv")),
    Case("UTF-16, high byte first", lm("a.txt", TEXT.encode("utf-16-be")), ("a.txt", "UTF-16", "iconv")),
    Case("UTF-32 with its mark", lm("a.txt", TEXT.encode("utf-32")), ("a.txt", "UTF-32", "iconv")),
    Case("UTF-16 to translate", translate("a.txt", TEXT.encode("utf-16")), ("a.txt", "UTF-16")),
    Case("UTF-16 to evaluate on", evaluate("a.txt", TEXT.encode("utf-16-le")), ("a.txt", "UTF-16")),
    Case("UTF-16 pairs", pairs("a.tsv", "a\tb\n".encode("utf-16-le")), ("a.tsv", "UTF-16")),
    Case("a NUL byte", lm("a.txt", f"{TEXT}a\0b\n"), ("a.txt: line 31", "NUL")),
    Case("a NUL byte to translate", translate("a.txt", "a dog\nno\0\n"), ("a.txt: line 2", "NUL")),
    Case("Latin-1", lm("a.txt", "fine\nna\u00efve\n".encode("latin-1")), ("a.txt: line 2 is not UTF-8",)),
    Case("half of a character", lm("a.txt", b"a\n\xed\xa0\x80\n"), ("a.txt: line 2 is not UTF-8",)),
    Case("an image", lm("a.txt", PNG + b"\n\0\0"), ("a.txt", "PNG image")),
    Case("a PDF", lm("a.txt", "%PDF-1.7\n" + TEXT), ("a.txt", "PDF")),
    Case("gzip without .gz", lm("a.txt", gzip.compress(TEXT.encode())), ("a.txt", "gzip", ".gz")),
    Case("xz without .xz", lm("a.txt", lzma.compress(TEXT.encode())), ("a.txt", "xz", ".xz")),
    Case("gzip in gzip", lm("a.gz", gzip.compress(gzip.compress(TEXT.encode()))), ("a.gz", "gzip")),
    Case("bzip2", lm("a.bz2", bz2.compress(TEXT.encode())), ("a.bz2", "bzip2", ".gz")),
    Case("zstandard", lm("a.zst", b"\x28\xb5\x2f\xfd" + bytes(50)), ("a.zst", "Zstandard", ".gz")),
    Case("zip", lm("a.zip", b"PK\x03\x04" + bytes(50)), ("a.zip", "zip", ".gz")),
    Case("parquet as text", lm("a.parquet", b"PAR1" + bytes(50)), ("a.parquet", "Parquet", "dataset_name")),
    Case("gzip that is cut", lm("a.gz", gzip.compress(TEXT.encode())[:-9]), ("a.gz: cannot be read",)),
    Case("plain text named .gz", lm("a.gz", TEXT), ("a.gz: cannot be read", "gzip")),
    Case("plain text named .xz", lm("a.xz", TEXT), ("a.xz: cannot be read",)),
    Case("gzip and more", lm("a.gz", gzip.compress(TEXT.encode()) + b"more"), ("a.gz: cannot be read",)),
    Case("line ends of old Macs", lm("a.txt", TEXT.replace("\n", "\r")), ("a.txt", "carriage return", "tr")),
    Case("the same to translate", translate("a.txt", "a dog\rno\r"), ("a.txt", "carriage return")),
    Case("an empty file", lm("a.txt", ""), ("a.txt", "no text")),
    Case("only white space", lm("a.txt", " \n\t\n\f\n"), ("a.txt", "no text")),
    Case("a megabyte of carriage returns", lm("a.txt", "\r" * 1_000_000), ("a.txt", "no text")),
    # Paths that are not files.
    Case("a folder", lm_of(folder), ("train_files", "folder", "is a folder")),
    Case("a folder to evaluate on", validation_of(folder), ("validation_files", "is a folder")),
    Case("a pipe", lm_of(fifo), ("train_files", "pipe", "only once")),
    Case("a pipe of validation text", validation_of(fifo), ("validation_files", "pipe", "only once")),
    Case(
        "a pipe of pairs",
        lambda place: ["train-translation", place.translation_config(train_source_files=[str(fifo(place))])],
        ("train_source_files", "only once"),
    ),
    Case("a socket", lm_of(a_socket), ("train_files", "is a socket")),
    Case("a device", lm_of(lambda place: "/dev/null"), ("train_files", "/dev/null", "is a device")),
    Case(
        "an endless device to translate",
        lambda place: ["translate", place.translator(), "/dev/zero"],
        ("/dev/zero", "NUL"),
    ),
    Case("standard input to train on", lm_of(lambda place: "-"), ("train_files", "'-'", "standard input")),
    Case("a link to nothing", lm_of(link_to_nothing), ("train_files", "link.txt", "gone.txt")),
    Case("no such validation text", validation_of(lambda place: place / "gone.txt"), ("validation_files", "gone.txt")),
    Case("a path with NUL", lm_of(lambda place: "a\0*.txt"), ("train_files", "NUL")),
    Case(
        "a variable that is not set", lm_of(lambda place: "${NOT_SET_ANYWHERE}/a"), ("train_files", "NOT_SET_ANYWHERE")
    ),
    Case(
        "no such file to evaluate on",
        lambda place: ["evaluate-lm", place.lm(), place / "gone.txt"],
        ("files", "gone.txt"),
    ),
    Case(
        "no such file to translate",
        lambda place: ["translate", place.translator(), place / "gone.txt"],
        ("gone.txt",),
    ),
    # Pairs.
    Case("unequal numbers of lines", aligned("a\nb\n", "a\n"), ("a.en has 2 lines", "a.de has 1")),
    Case("unequal by much", aligned("a\nb\nc\nd\n", "a\n"), ("a.en has 4 lines", "a.de has 1")),
    Case("no pair has text", aligned("a\n\n", "\nb\n"), ("a.en", "no pair has text on both sides")),
    Case("one column", pairs("a.tsv", "a\tb\nc\n"), ("a.tsv: line 2", "1 column")),
    Case("three columns", pairs("a.tsv", "a\tb\tc\n"), ("a.tsv: line 1", "3 columns")),
    Case("not JSON", pairs("a.jsonl", '{"source": "a"\n'), ("a.jsonl: line 1: not JSON",)),
    Case("deep JSON", pairs("a.jsonl", NESTED + "\n"), ("a.jsonl: line 1", "nested")),
    Case("a JSON list", pairs("a.jsonl", '["a", "b"]\n'), ("a.jsonl: line 1", "list")),
    Case("a JSON number", pairs("a.jsonl", "1\n"), ("a.jsonl: line 1", "int")),
    Case("a huge JSON number", pairs("a.jsonl", "9" * 5000 + "\n"), ("a.jsonl: line 1",)),
    Case("a JSON file, not JSONL", pairs("a.jsonl", json.dumps([EN_DE], indent=1)), ("a.jsonl: line 1", "JSON")),
    Case("a missing key", pairs("a.jsonl", '{"source": "a", "tgt": "b"}\n'), ("line 1", "'target'", "'tgt'")),
    Case("a number as text", pairs("a.jsonl", '{"source": "a", "target": 1}\n'), ("line 1", "'target'", "int")),
    Case("NaN as text", pairs("a.jsonl", '{"source": "a", "target": NaN}\n'), ("line 1", "'target'", "float")),
    Case(
        "a key twice",
        pairs("a.jsonl", '{"source": "a", "source": "c", "target": "b"}\n'),
        ("line 1", "'source'", "twice"),
    ),
    Case(
        "half of a character in JSON",
        pairs("a.jsonl", '{"source": "\\ud83d", "target": "b"}\n'),
        ("line 1", "surrogates"),
    ),
    Case(
        "a language that is missing",
        pairs("a.jsonl", '{"translation": {"en": "a", "fr": "b"}}\n'),
        ("line 1", "'de'", "'fr'"),
    ),
    Case("pairs in a .csv", pairs("a.csv", "a,b\n"), ("a.csv", ".tsv or .jsonl")),
    # Data sets.
    Case("a column of numbers", lm_dataset("train.jsonl", jsonl({"text": 1})), ("text_column='text'", "int64")),
    Case("a column of lists", lm_dataset("train.jsonl", jsonl({"text": ["a"]})), ("text_column='text'",)),
    Case("a column of nothing", lm_dataset("train.jsonl", jsonl({"text": None})), ("text",)),
    Case("only blank text", lm_dataset("train.jsonl", jsonl({"text": " \n"}, {"text": ""})), ("no text",)),
    Case("no such column", lm_dataset("train.csv", lambda path: path.write_text("body\na\n")), ("'text'", "body")),
    Case(
        "no such split",
        lm_dataset("train.jsonl", jsonl({"text": "a"}), train_split="dev"),
        ("dataset_name", "data", "dev"),
    ),
    Case("a broken data set", lm_dataset("train.jsonl", lambda path: path.write_text("{")), ("dataset_name", "data")),
    Case(
        "a broken parquet file",
        lm_dataset("train.parquet", lambda path: path.write_bytes(b"PAR1")),
        ("dataset_name", "data"),
    ),
    Case("an empty data set", lm_dataset("train.txt", lambda path: path.write_text("")), ("dataset_name", "data")),
    Case("a data set without files", lm_dataset("readme.md", lambda path: None), ("dataset_name", "data")),
    Case("languages that are numbers", pairs_dataset("train.jsonl", jsonl({"en": 1, "de": 2})), ("'en'", "int64")),
    Case("translations that are text", pairs_dataset("train.jsonl", jsonl({"translation": "a"})), ("translation",)),
    Case(
        "translations that are lists",
        pairs_dataset("train.jsonl", jsonl({"translation": {"en": ["a"], "de": "b"}})),
        ("'en'",),
    ),
    Case("a language that is no column", pairs_dataset("train.parquet", parquet(en=["a"], fr=["b"])), ("'de'", "fr")),
    # Long words.
    Case(
        "a word of 200,000 bytes", lm_bpe(without_spaces(200_000)), ("1 word", "1,000 bytes", "cut"), ends="recovers"
    ),
    Case(
        "a word of 500,000 equal bytes",
        lm_bpe("a" * 500_000 + "\n"),
        ("1 word", "1,000 bytes", "cut"),
        ends="recovers",
    ),
    Case("a long word to translate", translation_of_long, ("2 words", "1,000 bytes", "cut"), ends="recovers"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_text_is_refused_by_name(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
