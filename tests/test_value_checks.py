"""Checks of the user's values by type and by range."""

import datetime
import math
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from moe_hf.errors import InputError
from moe_hf.value_checks import COUNT, NOT_NEGATIVE, SHARE, Range, check_range, read_json, shown, typed


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", int, 3),
        (3.0, int, 3),
        (np.int64(3), int | None, 3),
        ("1e-3", float, 0.001),
        (2, float, 2),
        (np.float32(0.5), float, 0.5),
        ("True", bool, True),
        (0, bool | None, False),
        ("no", str | bool, False),
        ("all", str | bool, "all"),
        (Path("a/b"), str, "a/b"),
        ("a", list[str] | None, ["a"]),
        (("a", Path("b")), list[str], ["a", "b"]),
        (["1", 2], list[int], [1, 2]),
        ('{"a": 1}', dict | str | None, '{"a": 1}'),
        ({"a": 1}, dict | None, {"a": 1}),
        ("red", Colour | str, Colour.RED),
        (Colour.BLUE, Colour, Colour.BLUE),
        (None, int | None, None),
    ],
)
def test_value_becomes_what_the_annotation_says(value, annotation, expected):
    found = typed("x", value, annotation)
    assert found == expected and type(found) is type(expected)


def test_one_file_stays_as_it_was_given():
    assert typed("train_files", "a.txt", list[str] | None) == "a.txt"


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("3.5", int, "x='3.5' must be a whole number"),
        (3.5, int, "x=3.5 must be a whole number"),
        (True, int, "x=True must be a whole number"),
        (math.nan, int, "x=nan must be a whole number"),
        (2**63, int, f"x={2**63} must be at most {2**63 - 1}"),
        (datetime.date(2024, 1, 2), int, "x=2024-01-02 must be a whole number"),
        (False, float, "x=False must be a number"),
        (2, bool, "x=2 must be true or false"),
        ("maybe", bool, "x='maybe' must be true or false"),
        (3, str | None, "x=3 is not text; .*in quotes"),
        ("a\0b", str, "x='a.x00b' must not hold the character NUL"),
        ([3], list[str], r"x\[0\]=3 is not text"),
        (3, list[dict] | str, "x=3 must be a list of mappings or text"),
        ('{"a": 1, "a": 2}', dict | str, "x: 'a' is given twice"),
        ('{"a": ', dict, "x is not valid JSON"),
        ("green", Colour | str, "x='green' is not known, use one of red, blue"),
        (None, int, "x is empty: give a whole number, or leave x out"),
    ],
)
def test_value_of_another_type_is_refused(value, annotation, message):
    with pytest.raises(InputError, match=f"^{message}"):
        typed("x", value, annotation)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (COUNT, [1, 2**62], [0, -1, math.nan, math.inf], "at least 1"),
        (NOT_NEGATIVE, [0, 1e300], [-1e-9, math.nan, math.inf], "at least 0 and finite"),
        (SHARE, [0, 0.999], [1, -0.1, math.nan], "at least 0 and below 1"),
        (Range(least=0, is_finite=False), [0, math.inf], [-1, math.nan], "at least 0"),
        (Range(above=0, is_whole_above_1=True), [0.5, 1, 2.0], [0, 2.5], "above 0 and finite, and whole if above 1"),
        (Range(), [-1e300], [math.inf, -math.inf, math.nan], "finite"),
    ],
    ids=str,
)
def test_range_has_its_numbers_and_words(allowed, inside, outside, words):
    for value in inside:
        check_range("x", value, allowed)
    for value in outside:
        with pytest.raises(InputError, match=f"^x={value} must be {words}$".replace("+", "[+]")):
            check_range("x", value, allowed)


def test_a_value_is_shown_on_one_short_line():
    endless = [1]
    endless.append(endless)
    for value in ("a\nb" * 10_000, list(range(10**6)), endless, {"a": ["b" * 10**6] * 1000}, 10**1000):
        assert len(shown(value)) < 2500 and "\n" not in shown(value)


def test_json_is_read():
    assert read_json("x", '[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
    with pytest.raises(InputError, match="^x is not valid JSON"):
        read_json("x", "[" * 100_000)
