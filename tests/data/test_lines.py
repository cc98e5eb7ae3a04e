"""Reading lines: which lines are refused and why, and which are read unchanged."""

import io
import os

import pytest

from moe_hf.data import lines
from moe_hf.data.lines import read_lines
from moe_hf.data.paths import expand_file_patterns
from moe_hf.errors import InputError


@pytest.fixture
def file(tmp_path):
    def write(data):
        (tmp_path / "a.txt").write_bytes(data)
        return str(tmp_path / "a.txt")

    return write


def test_a_line_above_the_limit_is_refused_by_its_number(file, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_MIB", 1)
    longest = b"x" * (1 << 20)
    assert list(read_lines(file(b"a\n" + longest))) == ["a", longest.decode()]
    with pytest.raises(InputError, match=r"a.txt: line 2 has more than 1 MiB: break it into lines"):
        list(read_lines(file(b"a\n" + longest + b"x\nb\n")))


def test_a_carriage_return_inside_a_line_stays(file):
    assert list(read_lines(file(b"a\rb\nc\rd"))) == ["a\rb", "c\rd"]
    assert list(read_lines(file(b"a\r"))) == ["a"]


def test_lines_before_a_nul_byte_are_read(file):
    found = read_lines(file(b"a\nb\0\n"))
    assert next(found) == "a"
    with pytest.raises(InputError, match="line 2 has a NUL byte"):
        next(found)


@pytest.mark.parametrize(("order", "encoding"), [("LE", "utf-16-le"), ("BE", "utf-16-be")])
def test_the_advice_for_utf_16_is_right(file, order, encoding):
    with pytest.raises(InputError, match=f"looks like UTF-16 text: convert it with iconv -f UTF-16{order} "):
        list(read_lines(file("one line\nand more\n".encode(encoding))))


def test_standard_input_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n")))
    with pytest.raises(InputError, match="^standard input: line 2 is not UTF-8"):
        list(read_lines("-"))
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="^standard input is closed: name a file"):
        list(read_lines("-"))


def test_a_pattern_takes_files_alone(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert expand_file_patterns(str(tmp_path / "*.txt")) == [str(tmp_path / "a.txt")]


def test_the_argument_is_named(tmp_path):
    with pytest.raises(InputError, match="^validation_files: no file matches"):
        expand_file_patterns([str(tmp_path / "*.txt")], "validation_files")
    with pytest.raises(InputError, match=r"^validation_files=\[\] names no file"):
        expand_file_patterns([], "validation_files")
