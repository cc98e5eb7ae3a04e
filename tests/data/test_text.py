"""Reading text from files and data sets, and the stream of token ids made from the text."""

import gzip
import json
import lzma
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_hf.data.text as text_data
from moe_hf.data import lines
from moe_hf.data.text import TOKEN_FEATURES, TokenStream, load_text_dataset, tokenize_to_stream
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.errors import InputError

LINES = ["one two", "", "  three\tfour ", "five\u2028six\u0085seven\x0ceight\rnine", "zehn äöü 🙂"]
TEXT = "\n".join(LINES) + "\n"
CHUNKS = [[[5, 1], [2]], [[7, 8, 9, 2]], [[2], [2], [4, 2]], [[3, 3, 3, 2]]]
FLAT = [token for chunk in CHUNKS for line in chunk for token in line]


@pytest.fixture
def load(tmp_path):
    """Load with a cache of this test only; gives a list of lines."""
    return lambda *args, **kwargs: load_text_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.fixture
def text_file(tmp_path):
    def write(name, content=TEXT):
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode()
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wb") as file:
            file.write(data)
        return str(path)

    return write


def word_tokenizer(lines=LINES):
    return train_tokenizer(lines, kind="word", vocab_size=1000)


def chunked_stream():
    """A stream of several Arrow chunks, as several writer batches or processes leave it."""
    columns = [{"input_ids": chunk, "num_words": [len(line) for line in chunk]} for chunk in CHUNKS]
    return TokenStream(concatenate_datasets([Dataset.from_dict(c, features=TOKEN_FEATURES) for c in columns]))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz"])
def test_lines_end_at_newlines_only(load, text_file, name):
    dataset = load([text_file(name)])
    assert dataset.column_names == ["text"]
    assert list(dataset["text"]) == LINES


def test_windows_line_ends_and_byte_order_mark_are_removed(load, text_file):
    path = text_file("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert list(load([path])["text"]) == ["one", "", "two"]


def test_empty_lines_can_be_dropped_and_lines_limited(load, text_file):
    path = text_file("a.txt", "a\n\n \nb\nc\n")
    assert list(load([path], keep_empty_lines=False)["text"]) == ["a", "b", "c"]
    assert list(load([path], max_lines=2)["text"]) == ["a", ""]
    assert list(load([path], keep_empty_lines=False, max_lines=2)["text"]) == ["a", "b"]


def test_line_limit_counts_over_all_files(load, text_file):
    files = [text_file("a.txt", "a\nb\n"), text_file("b.txt", "c\nd\n")]
    assert list(load(files, max_lines=3, num_proc=2)["text"]) == ["a", "b", "c"]


def test_patterns_are_expanded_sorted_and_read_once(load, text_file, tmp_path, monkeypatch):
    for name in ("c", "b", "a[1]"):
        text_file(f"{name}.txt", f"{name}\n")
    monkeypatch.setenv("SOME_TEXT", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    files = ["~/c.txt", "${SOME_TEXT}/*.txt", str(tmp_path / "a[1].txt")]
    assert list(load(files)["text"]) == ["c", "a[1]", "b"]


def test_processes_keep_the_order_of_the_files(load, text_file):
    files = [text_file(f"{i}.txt", f"{i}\n") for i in range(3)]
    assert list(load(files, num_proc=2)["text"]) == ["0", "1", "2"]


def test_unchanged_file_is_read_once(load, text_file, monkeypatch):
    path = text_file("a.txt")
    first = load([path])
    monkeypatch.setattr(text_data, "read_lines", lambda path: pytest.fail("read again"))
    assert list(load([path])["text"]) == list(first["text"])
    assert load([path]).cache_files == first.cache_files != []


def test_changed_file_is_read_again(load, text_file):
    path = text_file("a.txt", "old\n")
    load([path])
    time = os.stat(path).st_mtime_ns
    text_file("a.txt", "new\n")  # the same size
    os.utime(path, ns=(time + 1000, time + 1000))
    assert list(load([path])["text"]) == ["new"]


def test_data_set_rows_are_split_to_lines(load, tmp_path):
    rows = [{"body": "a\n", "id": 1}, {"body": "b\r\nc\u2028d\n\n", "id": 2}, {"body": None, "id": 3}]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub_name = str(tmp_path / "hub")
    dataset = load(hub_name=hub_name, text_column="body")
    assert dataset.column_names == ["text"]
    assert list(dataset["text"]) == ["a", "b", "c\u2028d", "", ""]
    assert list(load(hub_name=hub_name, text_column="body", keep_empty_lines=False)["text"]) == ["a", "b", "c\u2028d"]
    assert list(load(hub_name=hub_name, text_column="body", max_lines=2)["text"]) == ["a", "b"]
    with pytest.raises(InputError, match=r"text_column='text' is not in .*\['body', 'id'\]"):
        load(hub_name=hub_name)
    with pytest.raises(InputError, match="split=test: the data set cannot be loaded"):
        load(hub_name=hub_name, text_column="body", split="test")


def test_missing_data_set_is_an_input_error(load, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load(hub_name=str(tmp_path / "nothing"))


@pytest.mark.parametrize("sources", [{}, {"files": ["a"], "hub_name": "b"}])
def test_exactly_one_source_is_needed(load, sources):
    with pytest.raises(InputError, match="exactly one of files and hub_name"):
        load(**sources)


def test_line_limit_must_be_positive(load, text_file):
    with pytest.raises(InputError, match="max_lines=0"):
        load([text_file("a.txt")], max_lines=0)


def test_patterns_without_files_are_named(load, tmp_path, monkeypatch):
    monkeypatch.delenv("UNSET_FOLDER", raising=False)
    with pytest.raises(InputError, match=r"no file matches .*\*\.txt"):
        load([str(tmp_path / "*.txt")])
    with pytest.raises(InputError, match="environment variable UNSET_FOLDER"):
        load(["${UNSET_FOLDER}/a.txt"])
    with pytest.raises(InputError, match="at least one"):
        load([])


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("empty.txt", lambda data: b"", "no text"),
        ("blank.txt", lambda data: b"\n \n", "no text .2 lines"),
        ("latin.txt", lambda data: "fine\nna\u00efve\n".encode("latin-1"), "line 2 is not UTF-8 .*byte 2"),
        ("cut.txt.gz", lambda data: data[:-12], "cannot be read"),
        ("cut.txt.xz", lambda data: data[:-12], "cannot be read"),
        ("plain.txt.gz", lambda data: b"plain text\n", "cannot be read"),
        ("plain.txt.xz", lambda data: b"plain text\n", "cannot be read"),
    ],
)
def test_bad_file_is_named(load, text_file, name, damage, message, num_proc):
    path = text_file(name)
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(damage(data))
    with pytest.raises(InputError, match=f"{name}: .*{message}") as caught:
        load([text_file("fine.txt"), path], num_proc=num_proc)
    assert "\n" not in str(caught.value)


def test_file_without_permission_is_named(load, text_file, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lines, "open", refuse, raising=False)
    with pytest.raises(InputError, match="a.txt: cannot be read .*Permission denied"):
        load([text_file("a.txt")])


def test_every_line_ends_with_eos(load, text_file):
    tokenizer = word_tokenizer()
    stream = tokenize_to_stream(load([text_file("a.txt")]), tokenizer)
    assert (
        tokenizer.decode(stream[:]).split(" ") == " <eos> ".join([*(" ".join(x.split()) for x in LINES), ""]).split()
    )
    assert stream.num_lines == len(LINES)
    assert stream.num_words == len(stream) == sum(len(line.split()) + 1 for line in LINES)


@pytest.mark.parametrize(("kind", "size"), [("word", 1000), ("bpe", 257)])
def test_a_literal_end_symbol_ends_no_line(load, text_file, kind, size):
    tokenizer = train_tokenizer(LINES, kind=kind, vocab_size=size)
    stream = tokenize_to_stream(load([text_file("a.txt", "one <eos> two\n<eos>\n")]), tokenizer)
    assert list(stream).count(tokenizer.eos_token_id) == 2


def test_lines_without_text_are_an_input_error():
    with pytest.raises(InputError, match="the 3 lines have no text"):
        tokenize_to_stream(Dataset.from_dict({"text": ["", " ", ""]}), word_tokenizer())


def test_a_file_that_changes_while_it_is_read_is_named(load, text_file, monkeypatch):
    path = text_file("a.txt", "a\n")

    def read_and_grow(path):
        yield from lines.read_lines(path)
        text_file("a.txt", "a\nb\n")

    monkeypatch.setattr(text_data, "read_lines", read_and_grow)
    with pytest.raises(InputError, match="a.txt: the file changed while it was read"):
        load([path])
    monkeypatch.undo()
    assert list(load([path])["text"]) == ["a", "b"]


def test_words_are_counted_whatever_the_tokens(load, text_file):
    tokenizer = train_tokenizer(LINES, kind="bpe", vocab_size=257)
    stream = tokenize_to_stream(load([text_file("a.txt")]), tokenizer)
    assert stream.num_words == sum(len(line.split()) + 1 for line in LINES)
    assert len(stream) == len(TEXT.encode())


def test_processes_do_not_change_the_stream(load, text_file):
    dataset = load([text_file("a.txt")])
    tokenizer = word_tokenizer()
    parallel = tokenize_to_stream(dataset, tokenizer, num_proc=2, batch_size=1)[:]
    assert parallel.tolist() == tokenize_to_stream(Dataset.from_list(list(dataset)), tokenizer)[:].tolist()


def test_second_run_does_not_tokenise_again(load, text_file, monkeypatch):
    dataset, tokenizer = load([text_file("a.txt")]), word_tokenizer()
    first = tokenize_to_stream(dataset, tokenizer)[:].tolist()
    tokenizer(LINES, padding=True, truncation=True, max_length=1)  # such settings are not a part of the tokenizer
    monkeypatch.setattr(text_data, "_tokenize_batch", lambda *args, **kwargs: pytest.fail("tokenised again"))
    assert tokenize_to_stream(dataset, tokenizer)[:].tolist() == first


def test_other_tokenizer_tokenises_again(load, text_file):
    dataset = load([text_file("a.txt")])
    first = tokenize_to_stream(dataset, word_tokenizer())
    assert tokenize_to_stream(dataset, word_tokenizer(["one two"]))[:].tolist() != first[:].tolist()


def test_cache_is_found_by_another_process(load, text_file, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = text_file("a.txt")
    tokenize_to_stream(load([path]), tokenizer)
    caches = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert len(caches) == 2
    program = """if True:
        import sys
        from transformers import AutoTokenizer
        from moe_hf.data.text import load_text_dataset, tokenize_to_stream
        dataset = load_text_dataset([sys.argv[1]], cache_dir=sys.argv[2])
        tokenize_to_stream(dataset, AutoTokenizer.from_pretrained(sys.argv[3]))
    """
    arguments = [path, str(tmp_path / "cache"), str(tmp_path / "tokenizer")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True)
    assert sorted((tmp_path / "cache").rglob("*.arrow")) == caches


def test_tokenizer_without_eos_is_an_input_error(load, text_file):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos_token_id=None"):
        tokenize_to_stream(load([text_file("a.txt")]), tokenizer)


@pytest.mark.parametrize(("lines", "num_tokens"), [([], 0), ([""], 1)])
def test_fewer_than_two_tokens_are_an_input_error(lines, num_tokens):
    dataset = Dataset.from_dict({"text": lines})
    with pytest.raises(InputError, match=f"have {num_tokens} tokens, at least 2"):
        tokenize_to_stream(dataset, word_tokenizer())


BOUNDS = st.none() | st.integers(-len(FLAT) - 3, len(FLAT) + 3)


@settings(deadline=None)
@given(start=BOUNDS, stop=BOUNDS, step=st.none() | st.sampled_from([-3, -1, 1, 2]))
def test_stream_slices_like_a_list(start, stop, step):
    tokens = chunked_stream()[start:stop:step]
    assert tokens.dtype == np.int64
    assert tokens.tolist() == FLAT[start:stop:step]


def test_stream_indexes_and_iterates_like_a_list():
    stream = chunked_stream()
    assert len(stream) == len(FLAT)
    assert list(stream) == FLAT
    assert stream[-1] == FLAT[-1]
    with pytest.raises(IndexError):
        stream[len(FLAT)]


def test_stream_maps_the_file_and_keeps_it_unchanged(load, text_file):
    stream = tokenize_to_stream(load([text_file("a.txt")]), word_tokenizer())
    before = stream[:].tolist()
    assert not any(chunk.flags.writeable or chunk.flags.owndata for chunk in stream._chunks)
    stream[:][:] = 0
    assert stream[:].tolist() == before
    assert pickle.loads(pickle.dumps(stream))[:].tolist() == before
