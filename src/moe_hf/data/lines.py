"""The lines of a text file, plain or compressed."""

import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from ..errors import InputError


def read_lines(path: str, allow_no_text: bool = False) -> Iterator[str]:
    """Yield the lines of a plain, .gz or .xz text file.

    Args:
        path: the file; "-" is standard input.
        allow_no_text: whether the file may have only empty lines.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or has no text, unless that is allowed.
    """
    number, has_text = 0, allow_no_text
    try:
        with _open_bytes(path) as file:
            for number, raw_line in enumerate(file, start=1):
                line = raw_line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                has_text = has_text or bool(line.strip())
                yield line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: line {number} is not UTF-8 ({error.reason}, byte {error.start} of the line)"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not has_text:
        raise InputError(f"{path}: the file has no text ({number} lines, all empty)")


def _open_bytes(path: str):
    if path == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: name a file, or redirect one to it")
        return nullcontext(sys.stdin.buffer)
    return {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)(path, "rb")
