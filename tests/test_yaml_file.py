"""YAML files of arguments."""

import pytest

from moe_hf.errors import InputError
from moe_hf.yaml_file import read_yaml


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes) -> dict:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml(path)

    return read


def test_merged_mappings_may_replace_keys(read):
    values = read("base: &base {a: 1, b: 2.5}\nfirst: {<<: *base, a: 3}\nsecond:\n  <<: [*base, {c: 4}]\n  b: 5\n")
    assert values == {"base": {"a": 1, "b": 2.5}, "first": {"a": 3, "b": 2.5}, "second": {"a": 1, "b": 5, "c": 4}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice.*line 3"),
        ("a: {b: 1, b: 2}\n", "b is given twice.*line 1"),
        ("seed: 12:30\n", "12:30 would be read as a number in base 60.*line 1"),
        ("share: 1:30.5\n", "1:30.5 would be read as a number in base 60"),
        ("seed: 2024-13-45\n", "month must be in 1..12"),
        ("a: " + "[" * 100_000, "not valid YAML"),
        (b"a: \xff\n", "utf-8"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("- a\n", "holds list, expected 'name: value' lines"),
    ],
    ids=range(9),
)
def test_what_is_not_strict_is_refused(read, text, message):
    with pytest.raises(InputError, match=rf"config.yaml.*{message}") as caught:
        read(text)
    assert "\n" not in str(caught.value)
