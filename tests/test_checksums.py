"""The checksums of a checkpoint's files detect every change and name the changed file."""

import json

import pytest

from moe_hf.checksums import CHECKSUM_FILE, check_checksums, write_checksums
from moe_hf.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "weights").write_bytes(bytes(1000))
    (tmp_path / "optimizer" / ".metadata").write_bytes(b"abc")
    write_checksums(tmp_path)
    return tmp_path


def test_what_was_saved_passes(folder):
    assert check_checksums(folder)
    assert json.loads((folder / CHECKSUM_FILE).read_text())["optimizer/.metadata"].startswith("ba7816bf")  # FIPS 180-2


def test_without_checksums_nothing_is_said(tmp_path):
    assert not check_checksums(tmp_path)


@pytest.mark.parametrize("bit", [0, 4000, 7999])
def test_every_flipped_bit_is_found(folder, bit):
    data = bytearray(1000)
    data[bit // 8] ^= 1 << bit % 8
    (folder / "weights").write_bytes(data)
    with pytest.raises(InputError, match="weights is not as it was saved"):
        check_checksums(folder)


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_every_change_of_length_is_found(folder, size):
    (folder / "weights").write_bytes(bytes(size))
    with pytest.raises(InputError, match="weights is not as it was saved"):
        check_checksums(folder)


def test_a_missing_file_is_named(folder):
    (folder / "optimizer" / ".metadata").unlink()
    with pytest.raises(InputError, match="is incomplete: optimizer/.metadata is missing"):
        check_checksums(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"weights": null}'])
def test_damaged_checksums_are_named(folder, content):
    (folder / CHECKSUM_FILE).write_bytes(content)
    with pytest.raises(InputError, match="is broken"):
        check_checksums(folder)
