"""Reads the lines of a text file, plain or compressed."""

import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ..errors import InputError

# The text8 corpus is a single line of 95 MiB.
MAX_LINE_MIB = 128
# {first bytes of a file that is not UTF-8 text: (kind of file, advice)}.
_FOREIGN = {
    b"\xff\xfe\0\0": ("UTF-32 text", "convert it with iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32 text", "convert it with iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\x1f\x8b": ("gzip data", "the name of such a file must end in .gz"),
    b"\xfd7zXZ\0": ("xz data", "the name of such a file must end in .xz"),
    b"BZh": ("bzip2 data", "unpack it; plain text, .gz and .xz are read"),
    b"\x28\xb5\x2f\xfd": ("Zstandard data", "unpack it; plain text, .gz and .xz are read"),
    b"PK\x03\x04": ("a zip archive", "unpack it; plain text, .gz and .xz are read"),
    b"PAR1": ("a Parquet file", "name it, or its folder, as dataset_name"),
    b"\x89PNG": ("a PNG image", "text is needed"),
    b"\xff\xd8\xff": ("a JPEG image", "text is needed"),
    b"%PDF-": ("a PDF document", "extract its text"),
}


def read_lines(path: str, allow_no_text: bool = False) -> Iterator[str]:
    """Yield the lines of a plain, .gz or .xz text file.

    Args:
        path: the file; "-" is standard input.
        allow_no_text: whether a file with only empty lines is allowed.

    Raises:
        InputError: the file cannot be read, is not UTF-8, has a NUL byte, ends lines with "\\r" only, has a line of
            more than 128 MiB, or does not have text although `allow_no_text` is False.
    """
    name = "standard input" if path == "-" else path
    number, has_text = 0, allow_no_text
    try:
        with _open_bytes(path) as file:
            # The limit keeps a device or a compressed file with an endless line from filling the memory.
            for number, raw_line in enumerate(iter(partial(file.readline, (MAX_LINE_MIB << 20) + 1), b""), start=1):
                if problem := _problem(raw_line, number):
                    raise InputError(f"{name}: {problem}")
                line = raw_line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                has_text = has_text or bool(line.strip())
                yield line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: line {number} is not UTF-8 ({error.reason}, byte {error.start} of the line)"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read ({error})") from error
    if not has_text:
        raise InputError(f"{name}: the file has no text ({number} lines, all empty)")


def _problem(raw_line: bytes, number: int) -> str | None:
    """Return why a file is not UTF-8 text with lines, or None."""
    if number == 1:
        for start, (kind, advice) in _FOREIGN.items():
            if raw_line.startswith(start):
                return f"the file is {kind}: {advice}"
        if b"\r" in raw_line.strip(b"\r\n") and not raw_line.endswith(b"\n"):
            return "lines end with a carriage return alone, as on old Macs: convert the file with tr '\\r' '\\n'"
    if (num_nul := raw_line.count(0)) == 0:
        if len(raw_line) > MAX_LINE_MIB << 20:
            return f"line {number} has more than {MAX_LINE_MIB} MiB: break it into lines"
        return None
    if number == 1 and 0.4 < num_nul / len(raw_line) < 0.6:  # half of the bytes of ASCII text in UTF-16
        order = "BE" if raw_line[0] == 0 else "LE"
        return f"the file looks like UTF-16 text: convert it with iconv -f UTF-16{order} -t UTF-8"
    return f"line {number} has a NUL byte, so the file is not text: delete such bytes with tr -d '\\000' if it is"


def _open_bytes(path: str):
    if path == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: name a file, or redirect one to it")
        return nullcontext(sys.stdin.buffer)
    return {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)(path, "rb")
