"""Generates the corpus of the translation demo: phrases with numbers, dates and times in three languages.

Training and validation phrases share words but not values. A fixed share of the numbers, dates and times does not
occur in training phrases. A model can translate such a value only if it learnt how its parts combine.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from ..errors import InputError
from ..writing import whole_files
from . import phrases
from .phrases import Phrase

LANGUAGES = Phrase._fields
MAX_TRAIN_LINES = 20_000
MAX_VALID_LINES = 2_000

_LARGEST_NUMBER = 9_999
_LARGEST_COUNT = 999
_DAYS_OF_MONTH = dict(enumerate((31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), start=1))
_SHOWN_NUMBERS = {71, 92, 284, 1984, 2781}
_SHOWN_DATES = {(3, 3), (21, 8)}
_SHOWN_TIMES = {225, 280}


def _share_of_number(n: int) -> float:
    """Return the probability to hold out `n`: 0 for building blocks of other numbers, and for days and minutes."""
    if n < 32 or (n < 100 and n % 10 == 0) or (n < 1_000 and n % 100 == 0) or n % 1_000 == 0:
        return 0.0
    return 0.2 if n < 100 else 0.1  # higher below a hundred, because all ages are below a hundred


def _share_of_time(minutes: int) -> float:
    """Return the probability to hold out a time; half hours never are, because "half past four" is "halb fünf"."""
    return 0.0 if minutes % 60 == 30 else 0.2


def _hold_out(values: list, share: Callable, shown: set) -> frozenset:
    """Draw the held-out values with the probability `share(value)` for each value, and add the values in `shown`."""
    rng = Random(0)  # a fixed seed, so that every corpus has the same held-out values
    return frozenset({value for value in values if rng.random() < share(value)} | shown)


_NUMBERS = list(range(_LARGEST_NUMBER + 1))
_DATES = [(day, month) for month, length in _DAYS_OF_MONTH.items() for day in range(1, length + 1)]
_TIMES = list(range(35, 691, 5))  # minutes after twelve; French uses "midi" and "minuit" instead of "twelve"

HELD_OUT_NUMBERS = _hold_out(_NUMBERS, _share_of_number, _SHOWN_NUMBERS)
HELD_OUT_DATES = _hold_out(_DATES, lambda date: 0.1, _SHOWN_DATES)
HELD_OUT_TIMES = _hold_out(_TIMES, _share_of_time, _SHOWN_TIMES)


def _split(values: list, held_out_values: frozenset) -> dict[bool, list]:
    """Return {True: held-out values, False: other values}."""
    return {side: [value for value in values if (value in held_out_values) is side] for side in (False, True)}


_NUMBERS_OF_SPLIT = _split(_NUMBERS, HELD_OUT_NUMBERS)
_DATES_OF_SPLIT = _split(_DATES, HELD_OUT_DATES)
_TIMES_OF_SPLIT = _split(_TIMES, HELD_OUT_TIMES)
_YEARS_OF_SPLIT = _split([n for n in range(1_600, 2_000) if n % 100 >= 10], HELD_OUT_NUMBERS)

SHOWN_LINES = [
    phrases.number(2781),
    phrases.things("she", "have", 71, "apple"),
    phrases.things("I", "see", 284, "horse"),
    phrases.age("he", 92),
    phrases.birth("she", 1984),
    phrases.nth_thing(71, "house"),
    phrases.today(3, 3),
    phrases.arrival("we", 21, 8),
    phrases.clock("now", 225),
    phrases.clock("train", 280),
]
"""Example phrases. Their numbers, dates and times are held out of every corpus."""


class _Draw:
    """Random values of one side of the split."""

    def __init__(self, rng: Random, held_out: bool):
        self.choice = rng.choice
        self._held_out = held_out

    def number(self, smallest: int, largest: int = _LARGEST_NUMBER) -> int:
        """Draw the number of digits first, then the number, because most numbers are long."""
        return self.choice(self.choice(_numbers_by_length(self._held_out, smallest, largest)))

    def count(self, largest: int) -> int:
        while not phrases.is_countable(n := self.number(1, largest)):
            pass
        return n

    def year(self) -> int:
        return self.choice(_YEARS_OF_SPLIT[self._held_out])

    def date(self) -> tuple[int, int]:
        return self.choice(_DATES_OF_SPLIT[self._held_out])

    def time(self) -> int:
        return self.choice(_TIMES_OF_SPLIT[self._held_out])

    def subject(self) -> str:
        return self.choice(phrases.SUBJECTS)

    def noun(self) -> str:
        return self.choice(list(phrases.NOUNS))


_TEMPLATES: list[Callable[[_Draw], Phrase]] = [
    lambda draw: phrases.number(draw.number(0)),
    lambda draw: phrases.room(draw.subject(), draw.number(1)),
    lambda draw: phrases.price(draw.count(_LARGEST_NUMBER)),
    lambda draw: phrases.things(
        draw.subject(), draw.choice(phrases.THING_VERBS), draw.count(_LARGEST_COUNT), draw.noun()
    ),
    lambda draw: phrases.age(draw.subject(), draw.count(99)),
    lambda draw: phrases.nth_thing(draw.number(1, _LARGEST_COUNT), draw.noun()),
    lambda draw: phrases.today(*draw.date()),
    lambda draw: phrases.arrival(draw.subject(), *draw.date()),
    lambda draw: phrases.birth(draw.choice(("he", "she")), draw.year()),
    lambda draw: phrases.clock(draw.choice(list(phrases.CLOCK_EVENTS)), draw.time()),
]


def generate_phrases(num_phrases: int, held_out: bool, seed: int) -> list[Phrase]:
    """Return distinct phrases in random order.

    All kinds of phrases are equally frequent until kinds with few values (dates, times, ages) are used up.

    Args:
        num_phrases: up to `MAX_VALID_LINES` if `held_out`, else up to `MAX_TRAIN_LINES`. The function does not check
            the limit, and above it may never return.
        held_out: True for phrases with held-out values only; False for phrases without held-out values.
        seed: the same seed gives the same phrases.
    """
    rng = Random(seed)
    draw, drawn = _Draw(rng, held_out), {}  # a dict keeps its order, unlike a set
    while len(drawn) < num_phrases:
        drawn[rng.choice(_TEMPLATES)(draw)] = None
    return list(drawn)


def write_translation_corpus(
    folder: str | Path, num_train_lines: int = 12_000, num_valid_lines: int = 300, seed: int = 0
) -> dict[str, dict[str, Path]]:
    """Write train.en, train.de, train.fr and valid.* (UTF-8); line i of each language is the same phrase.

    A file does not repeat a line. Held-out numbers, dates and times of validation phrases do not occur in training
    phrases. The held-out values are always the same, and valid.* does not depend on `num_train_lines`.

    Args:
        folder: folder for the files; created if missing.
        num_train_lines: up to `MAX_TRAIN_LINES`.
        num_valid_lines: up to `MAX_VALID_LINES`.
        seed: seed of the phrases and their order.

    Returns:
        {"train" or "valid": {language: path}}.

    Raises:
        InputError: a number of lines is below 1 or above `MAX_TRAIN_LINES` or `MAX_VALID_LINES`.
    """
    for name, value, largest in (
        ("num_train_lines", num_train_lines, MAX_TRAIN_LINES),
        ("num_valid_lines", num_valid_lines, MAX_VALID_LINES),
    ):
        if not 1 <= value <= largest:
            raise InputError(f"{name}={value} is outside 1 to {largest}")
    folder = Path(folder)
    paths = {}
    with whole_files(folder, "folder") as inside:
        for part, num_lines, held_out in (("train", num_train_lines, False), ("valid", num_valid_lines, True)):
            paths[part] = {language: folder / f"{part}.{language}" for language in LANGUAGES}
            for path, lines in zip(paths[part].values(), zip(*generate_phrases(num_lines, held_out, seed))):
                text = "".join(f"{line}\n" for line in lines)
                (inside / path.name).write_text(text, encoding="utf-8", newline="\n")
    return paths


@cache
def _numbers_by_length(held_out: bool, smallest: int, largest: int) -> list[list[int]]:
    numbers = [n for n in _NUMBERS_OF_SPLIT[held_out] if smallest <= n <= largest]
    groups = ([n for n in numbers if len(str(n)) == length] for length in range(1, 5))
    return [group for group in groups if group]
