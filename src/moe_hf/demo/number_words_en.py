"""English number words up to 9,999 with their hyphens: "two thousand and twenty-one", "the twenty-first of March"."""

import re

from .number_words import number_in_words, ordinal_in_words, time_in_words

LARGEST_NUMBER = 9_999
MONTHS = "January February March April May June July August September October November December".split()

_UNITS = "|".join([word for n in range(1, 10) for word in (number_in_words(n), ordinal_in_words(n))])
_TENS_AND_UNITS = re.compile(rf"ty (?=(?:{_UNITS})\b)")


def cardinal(n: int) -> str:
    """Return the cardinal of `n`, 0 to 9,999: "one thousand two hundred and thirty-four".

    Raises:
        ValueError: `n` is outside that range.
    """
    return _in_words(n, number_in_words)


def ordinal(n: int) -> str:
    """Return the ordinal of `n`, 1 to 9,999: "twenty-first", "one hundred and third".

    Raises:
        ValueError: `n` is outside that range.
    """
    if n == 0:
        raise ValueError(f"n={n} is outside 1 to {LARGEST_NUMBER}")
    return _in_words(n, ordinal_in_words) if n % 1_000 else f"{cardinal(n)}th"


def year(n: int) -> str:
    """Return the year `n`, 1110 to 1999 with last two digits of at least 10: "nineteen eighty-four".

    Raises:
        ValueError: `n` is not such a year.
    """
    century, rest = divmod(n, 100)
    if not 11 <= century <= 19 or rest < 10:
        raise ValueError(f"n={n} is not a year from 1110 to 1999 that ends in 10 to 99")
    return f"{cardinal(century)} {cardinal(rest)}"


def date(day: int, month: int) -> str:
    """Return the date for a day and a month, both counted from 1: "third of March"."""
    return f"{ordinal(day)} of {MONTHS[month - 1]}"


def clock(minutes: int) -> str:
    """Return the time `minutes` after twelve o'clock: "twenty-five to five", "four o'clock".

    Raises:
        ValueError: `minutes` is outside 0 to 719.
    """
    return _hyphenate(time_in_words(minutes))


def _in_words(n: int, below_a_thousand) -> str:
    if not 0 <= n <= LARGEST_NUMBER:
        raise ValueError(f"n={n} is outside 0 to {LARGEST_NUMBER}")
    thousands, rest = divmod(n, 1_000)
    if not thousands:
        return _hyphenate(below_a_thousand(n))
    words = f"{number_in_words(thousands)} thousand"
    if rest:
        words += f"{' and' if rest < 100 else ''} {below_a_thousand(rest)}"
    return _hyphenate(words)


def _hyphenate(words: str) -> str:
    return _TENS_AND_UNITS.sub("ty-", words)
