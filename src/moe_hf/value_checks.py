"""Checks the types and ranges of values that users give in YAML, on a command line or as keywords.

`typed` converts a value to the type of an annotation, or refuses it. `Range` defines which numbers are allowed.
"""

import dataclasses
import json
import math
import reprlib
import types
from collections.abc import Callable
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from .errors import InputError

LARGEST = 2**63 - 1  # the limit of counters in torch, numpy and Python's iterators
LARGEST_FACTOR = 2**31 - 1  # for numbers that are multiplied with each other
MOST_PROCESSES = 1024
MOST_BEAMS = 1000
MOST_CONTEXTS = 10_000  # places in a report, and tokens on either side of each place
TRUTH_VALUES = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(
    ("no", "false", "f", "n", "0"), False
)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200


def shown(value: Any) -> str:
    """Return a value on one short line, with text in quotes."""
    if isinstance(value, str | list | dict | tuple | set | bytes):
        return _repr.repr(value)
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of allowed numbers; NaN is never allowed.

    Attributes:
        least: the smallest number allowed.
        above: a lower bound that is not allowed itself.
        most: the largest number allowed.
        below: an upper bound that is not allowed itself.
        is_finite: whether infinity is refused.
        is_whole_above_1: whether a number above 1 must be whole. A number below 1 is then a share.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    is_finite: bool = True
    is_whole_above_1: bool = False

    def __contains__(self, value: float) -> bool:
        if math.isnan(value) or (math.isinf(value) and self.is_finite):
            return False
        is_inside = self.least <= value <= self.most and (value > self.above or self.above == -math.inf)
        is_whole = not self.is_whole_above_1 or value <= 1 or value == int(value)
        return is_inside and is_whole and (value < self.below or self.below == math.inf)

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        parts = [f"{words} {value}" for words, value in limits.items() if abs(value) < LARGEST]
        if self.is_finite and self.most == self.below == math.inf:
            parts.append("finite")
        return " and ".join(parts) + ", and whole if above 1" * self.is_whole_above_1


COUNT = Range(least=1, most=LARGEST)
NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(above=0)
SHARE = Range(least=0, below=1)
LENGTH_WEIGHT = Range(least=0, most=10)  # weights in GNMT's score
LENGTH_EXPONENT = Range(least=-10, most=10)  # exponents of a number of tokens; the power fits into float32


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Refuse a number outside a range; None and values of other types pass.

    Raises:
        InputError: the number is out of range; the message has the argument, the value and the range.
    """
    if isinstance(value, Real) and value not in allowed:
        raise InputError(f"{name}={shown(value)} must be {allowed}")


def check_choice(name: str, value: Any, choices) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        InputError: the value is not known; the message has the argument, the value and the choices.
    """
    if value not in choices:
        raise InputError(f"{name}={shown(value)} is not known, use one of {', '.join(map(str, choices))}")


def typed(name: str, value: Any, annotation: Any) -> Any:
    """Convert a value to the type that its argument's annotation says.

    An integer counts as a float. If the annotation does not allow text, text is read as a number, a truth value or
    JSON.

    Args:
        name: the argument's name.
        value: the value from YAML, from a command line, or from a caller.
        annotation: a type, such as int, `list[str] | None` or an enumeration.

    Returns:
        the converted value.

    Raises:
        InputError: the value has another type, or is empty although a value is needed.
    """
    is_union = get_origin(annotation) in (Union, types.UnionType)
    kinds = list(get_args(annotation)) if is_union else [annotation]
    allows_none = type(None) in kinds
    kinds = [kind for kind in kinds if kind is not type(None)]
    if value is None:
        if allows_none:
            return None
        raise InputError(f"{name} is empty: give {_words(kinds)}, or leave {name} out")
    if any(_is_enum(kind) for kind in kinds):  # text then means a member's name
        kinds = [kind for kind in kinds if kind is not str]
    for kind in sorted(kinds, key=lambda kind: kind is str):
        converted = _CONVERT.get(get_origin(kind) or kind, _as_other)(name, value, kind)
        if converted is not _REFUSED:
            return converted
    hint = ""
    if kinds == [str]:
        hint = "; YAML reads numbers, dates and no, on and yes as other values: write it in quotes"
    elif isinstance(value, str) and any(_is_enum(kind) for kind in kinds):
        choices = [member.value for kind in kinds if _is_enum(kind) for member in kind]
        check_choice(name, value, choices)
    word = "is not text" if kinds == [str] else f"must be {_words(kinds)}"
    raise InputError(f"{name}={shown(value)} {word}{hint}")


_REFUSED = object()


def _is_enum(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _as_bool(name, value, kind):
    if isinstance(value, str):
        return TRUTH_VALUES.get(value.lower(), _REFUSED)
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else _REFUSED


def _as_int(name, value, kind):
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        return _REFUSED
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number) or number != int(number):
        return _REFUSED
    if abs(number) > LARGEST:
        raise InputError(f"{name}={shown(value)} must be at most {LARGEST}")
    return number if type(number) is int else int(number)


def _as_float(name, value, kind):
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return _REFUSED
    if isinstance(number, bool) or not isinstance(number, Real):
        return _REFUSED
    if isinstance(number, Integral) and abs(number) > LARGEST:
        raise InputError(f"{name}={shown(value)} must be at most {LARGEST}")
    return number if type(number) in (int, float) else float(number)


def _as_text(name, value, kind):
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{name}={shown(value)} must not hold the character NUL")
    return value if isinstance(value, str) else _REFUSED


def _as_list(name, value, kind):
    if isinstance(value, str | Path) and str in get_args(kind):
        only = _as_text(name, value, str)
        return only if name.endswith("files") else [only]  # a run's arguments keep file names as given
    if not isinstance(value, list | tuple):
        return _REFUSED
    (inner,) = get_args(kind) or (Any,)
    return [typed(f"{name}[{number}]", item, inner) for number, item in enumerate(value)]


def _as_dict(name, value, kind):
    if isinstance(value, str) and value.lstrip().startswith("{"):
        read_json(name, value)  # only checked here; its consumer parses it again
        return value
    return value if isinstance(value, dict) or dataclasses.is_dataclass(value) else _REFUSED


def _as_other(name, value, kind):
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _REFUSED
    if _is_enum(kind) and not isinstance(value, kind):
        return kind(value) if value in [member.value for member in kind] else _REFUSED
    return value if isinstance(kind, type) and isinstance(value, kind) else _REFUSED


_CONVERT: dict[Any, Callable] = {
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: _as_text,
    list: _as_list,
    dict: _as_dict,
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def _words(kinds: list) -> str:
    words = []
    for kind in kinds:
        inner = get_args(kind)
        if get_origin(kind) is list:
            plural = {str: "texts", dict: "mappings", int: "whole numbers"}.get(inner[0], "values")
            words.append(f"a list of {plural}")
        elif _is_enum(kind):
            words.append(f"one of {', '.join(member.value for member in kind)}")
        else:
            words.append(_NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(words)


def read_json(name: str, text: str) -> Any:
    """Read JSON in which no mapping has a key twice.

    Args:
        name: the argument's name.
        text: the argument's value.

    Raises:
        InputError: the text is not JSON, or a mapping has a key twice.
    """

    def mapping(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{name}: {key!r} is given twice in {shown(text)}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON: {error}") from error
