"""Numbers, dates and clock times in lower-case English words: "one hundred and five", "ten past four"."""

LARGEST_NUMBER = 999

_UP_TO_NINETEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_MONTH_LENGTHS = dict(
    january=31,
    february=28,
    march=31,
    april=30,
    may=31,
    june=30,
    july=31,
    august=31,
    september=30,
    october=31,
    november=30,
    december=31,
)


def number_in_words(n: int) -> str:
    """Return the cardinal of `n`, 0 to 999, as words separated by spaces.

    Raises:
        ValueError: `n` is outside that range.
    """
    _check_range(n, smallest=0)
    if n < 20:
        return _UP_TO_NINETEEN[n]
    if n < 100:
        tens, units = divmod(n, 10)
        return _TENS[tens - 2] + (f" {number_in_words(units)}" if units else "")
    hundreds, rest = divmod(n, 100)
    return f"{_UP_TO_NINETEEN[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")


def ordinal_in_words(n: int) -> str:
    """Return the ordinal of `n`, 1 to 999: "first", "twentieth", "one hundred and thirty first".

    Raises:
        ValueError: `n` is outside that range.
    """
    _check_range(n, smallest=1)
    *leading, last = number_in_words(n).split()
    if last.endswith("y"):
        last = f"{last[:-1]}ieth"
    else:
        last = _IRREGULAR_ORDINALS.get(last, f"{last}th")
    return " ".join([*leading, last])


def date_in_words(day: int) -> str:
    """Return the date `day` days after the first of January, 0 to 364, in a year of 365 days: "third of march".

    Raises:
        ValueError: `day` is outside that range.
    """
    if not 0 <= day < 365:
        raise ValueError(f"day={day} is outside 0 to 364")
    for month, length in _MONTH_LENGTHS.items():
        if day < length:
            break
        day -= length
    return f"{ordinal_in_words(day + 1)} of {month}"


def time_in_words(minutes: int) -> str:
    """Return the time on a twelve-hour clock `minutes` after twelve o'clock, 0 to 719: "twenty five to five".

    Raises:
        ValueError: `minutes` is outside that range.
    """
    if not 0 <= minutes < 12 * 60:
        raise ValueError(f"minutes={minutes} is outside 0 to {12 * 60 - 1}")
    hour, minute = divmod(minutes, 60)
    if minute == 0:
        return f"{number_in_words(hour or 12)} o'clock"
    side = "past"
    if minute > 30:
        hour, minute, side = (hour + 1) % 12, 60 - minute, "to"
    distance = {15: "quarter", 30: "half"}.get(minute) or number_in_words(minute)
    return f"{distance} {side} {number_in_words(hour or 12)}"


def words_to_number(words: str) -> int:
    """Return the number whose cardinal is `words`; this is the inverse of `number_in_words`.

    Raises:
        ValueError: `words` is not a result of `number_in_words`.
    """
    if words not in _NUMBER_OF_WORDS:
        raise ValueError(f"words={words!r} is not a number from 'zero' to {number_in_words(LARGEST_NUMBER)!r}")
    return _NUMBER_OF_WORDS[words]


def _check_range(n: int, smallest: int) -> None:
    if not smallest <= n <= LARGEST_NUMBER:
        raise ValueError(f"n={n} is outside {smallest} to {LARGEST_NUMBER}")


_NUMBER_OF_WORDS = {number_in_words(n): n for n in range(LARGEST_NUMBER + 1)}
