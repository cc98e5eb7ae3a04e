"""Generates a small English corpus in six dialects, whose sentences can be checked by a program.

A language model trained on the corpus can be judged by the truth of its sentences. `prompt_of` cuts a held-out
sentence where its rest is determined, and `is_correct` says whether a complete sentence is true. Each dialect is
recognisable from its first words, so that experts can specialise. Words are separated by single spaces.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from .number_words import date_in_words, number_in_words, time_in_words, words_to_number

# A sixth of this number must be below the number of distinct sentences of the smallest dialect. Dialects are small, so
# that a small model can learn them.
MAX_DISTINCT_LINES = 12_000
_MAX_DRAWS = 1_000

PROMPTS = [
    "forty one , forty two , forty three ,",
    "ninety , eighty , seventy , sixty ,",
    "twelve plus thirty is",
    "fifty minus eight is",
    "the day after the thirty first of march is the",
    "if the third of may is a monday , the fifth of may is a",
    "half an hour after ten past four it is",
    "from quarter past six until half past six is",
    "anna buys two apples for four coins and one cake for six coins and pays",
    "c a t spells cat and m o o n spells",
    "fish is spelled f i s h and lamp is spelled",
]

_COUNTING_STEPS = (1, 2, 3, 5, 10)
_LARGEST_COUNT = 99
_LARGEST_SUM = 49
_SIGNS = {"plus": 1, "minus": -1, "after": 1, "before": -1}

_DATES = [date_in_words(day) for day in range(365)]
_DAY_OF_DATE = {date: day for day, date in enumerate(_DATES)}
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_DAYS_OF_SPAN = {"the day": 1, "two days": 2, "a week": 7}

_HALF_DAY = 12 * 60
_TIMES = {time_in_words(minutes): minutes for minutes in range(0, _HALF_DAY, 5)}
_MINUTES_OF_SPAN = {
    **{"a quarter of an hour": 15, "half an hour": 30, "three quarters of an hour": 45, "an hour": 60},
    **{"two hours": 120, "three hours": 180},
}

_SHOPPERS = "anna ben clara david emma frank".split()
_PRICE_LIST = (
    "apple apples 2, pear pears 3, egg eggs 1, potato potatoes 1, loaf loaves 5, cake cakes 6, cup cups 4, "
    "knife knives 7"
)
_PRICE_OF_GOODS = {
    f"{number_in_words(count)} {singular if count == 1 else plural}": count * int(price)
    for singular, plural, price in map(str.split, _PRICE_LIST.split(", "))
    for count in range(1, 4)
}
_COINS = {f"{number_in_words(count)} {'coin' if count == 1 else 'coins'}": count for count in range(1, 100)}
_WORDS_OF_COINS = {count: words for words, count in _COINS.items()}

_SPELLING_WORDS = (
    "ant bag bat bear bed bee bell bird boat book box bus cat coat cow desk dog door duck ear farm fire fish flag "
    "frog game girl goat gold hand hat hen hill home jam king kite lake lamp leaf lion map milk moon mouse nest "
    "nose nut owl pan park pen pig queen rain ring road rose sand ship shoe snow sock song star sun tent tree van "
    "wind wolf zoo"
).split()


def _counting(rng: Random) -> str:
    length, step = 4 + rng.randrange(3), rng.choice(_COUNTING_STEPS)
    start = rng.randrange(_LARGEST_COUNT + 1 - step * (length - 1))
    numbers = [number_in_words(start + step * i) for i in range(length)]
    return " , ".join(rng.choice((numbers, numbers[::-1]))) + " ."


def _counting_is_correct(earlier: str, last: str) -> bool:
    numbers = [words_to_number(words) for words in [*earlier.split(" , "), last]]
    step = numbers[1] - numbers[0]
    return abs(step) in _COUNTING_STEPS and all(b - a == step for a, b in zip(numbers, numbers[1:]))


def _arithmetic(rng: Random) -> str:
    part, total = sorted(rng.randrange(_LARGEST_SUM + 1) for _ in range(2))
    part_words, rest_words, total_words = map(number_in_words, (part, total - part, total))
    if rng.randrange(2):
        return f"{part_words} plus {rest_words} is {total_words} ."
    return f"{total_words} minus {part_words} is {rest_words} ."


def _arithmetic_is_correct(left: str, sign: str, right: str, result: str) -> bool:
    return words_to_number(left) + _SIGNS[sign] * words_to_number(right) == words_to_number(result)


def _calendar(rng: Random) -> str:
    day = rng.randrange(365)
    if rng.randrange(2):
        span, direction = rng.choice(list(_DAYS_OF_SPAN)), rng.choice(("after", "before"))
        other = day + _SIGNS[direction] * _DAYS_OF_SPAN[span]
        return f"{span} {direction} the {_DATES[day]} is the {_DATES[other % 365]} ."
    weekday, distance = rng.randrange(7), 1 + rng.randrange(3)
    first = f"the {_DATES[day]} is a {_WEEKDAYS[weekday]}"
    second = f"the {_DATES[(day + distance) % 365]} is a {_WEEKDAYS[(weekday + distance) % 7]}"
    return f"if {first} , {second} ."


def _date_is_correct(span: str, direction: str, date: str, result: str) -> bool:
    return (_DAY_OF_DATE[date] + _SIGNS[direction] * _DAYS_OF_SPAN[span] - _DAY_OF_DATE[result]) % 365 == 0


def _weekday_is_correct(date: str, weekday: str, later_date: str, later_weekday: str) -> bool:
    distance = (_DAY_OF_DATE[later_date] - _DAY_OF_DATE[date]) % 365
    return (_WEEKDAYS.index(weekday) + distance - _WEEKDAYS.index(later_weekday)) % 7 == 0


def _clock(rng: Random) -> str:
    start, span = 5 * rng.randrange(144), rng.choice(list(_MINUTES_OF_SPAN))
    end = (start + _MINUTES_OF_SPAN[span]) % _HALF_DAY
    start_words, end_words = time_in_words(start), time_in_words(end)
    after = f"{span} after {start_words} it is {end_words} ."
    before = f"{span} before {end_words} it is {start_words} ."
    return rng.choice((after, before, f"from {start_words} until {end_words} is {span} ."))


def _time_is_correct(span: str, direction: str, time: str, result: str) -> bool:
    return (_TIMES[time] + _SIGNS[direction] * _MINUTES_OF_SPAN[span] - _TIMES[result]) % _HALF_DAY == 0


def _span_is_correct(start: str, end: str, span: str) -> bool:
    return (_TIMES[end] - _TIMES[start]) % _HALF_DAY == _MINUTES_OF_SPAN[span]


def _shopping(rng: Random) -> str:
    shopper, first, second = rng.choice(_SHOPPERS), *(rng.choice(list(_PRICE_OF_GOODS)) for _ in range(2))
    prices = _PRICE_OF_GOODS[first], _PRICE_OF_GOODS[second]
    first_coins, second_coins, all_coins = (_WORDS_OF_COINS[coins] for coins in (*prices, sum(prices)))
    return f"{shopper} buys {first} for {first_coins} and {second} for {second_coins} and pays {all_coins} in all ."


def _shopping_is_correct(first: str, first_coins: str, second: str, second_coins: str, all_coins: str) -> bool:
    prices = _PRICE_OF_GOODS[first], _PRICE_OF_GOODS[second]
    return (*prices, sum(prices)) == (_COINS[first_coins], _COINS[second_coins], _COINS[all_coins])


def _spelling(rng: Random) -> str:
    first, second = rng.choice(_SPELLING_WORDS), rng.choice(_SPELLING_WORDS)
    if rng.randrange(2):
        return f"{' '.join(first)} spells {first} and {' '.join(second)} spells {second} ."
    return f"{first} is spelled {' '.join(first)} and {second} is spelled {' '.join(second)} ."


def _spelling_is_correct(*slots: str) -> bool:
    first, first_spelled, second, second_spelled = (slot.replace(" ", "") for slot in slots)
    return first == first_spelled and second == second_spelled


DIALECTS: dict[str, Callable[[Random], str]] = {
    "counting": _counting,
    "arithmetic": _arithmetic,
    "calendar": _calendar,
    "clock": _clock,
    "shopping": _shopping,
    "spelling": _spelling,
}

_LETTERS = "([a-z](?: [a-z])*)"
# {form: (dialect, check)}. The words before the last slot of a form determine its content.
_FORMS = {
    r"(.+ , .+) , (.+) \.": ("counting", _counting_is_correct),
    r"(.+) (plus|minus) (.+) is (.+) \.": ("arithmetic", _arithmetic_is_correct),
    r"(.+) (after|before) the (.+) is the (.+) \.": ("calendar", _date_is_correct),
    r"if the (.+) is a (.+) , the (.+) is a (.+) \.": ("calendar", _weekday_is_correct),
    r"(.+) (after|before) (.+) it is (.+) \.": ("clock", _time_is_correct),
    r"from (.+) until (.+) is (.+) \.": ("clock", _span_is_correct),
    rf"(?:{'|'.join(_SHOPPERS)}) buys (.+) for (.+) and (.+) for (.+) and pays (.+) in all \.": (
        "shopping",
        _shopping_is_correct,
    ),
    rf"{_LETTERS} spells ([a-z]+) and {_LETTERS} spells ([a-z]+) \.": ("spelling", _spelling_is_correct),
    rf"([a-z]+) is spelled {_LETTERS} and ([a-z]+) is spelled {_LETTERS} \.": ("spelling", _spelling_is_correct),
}


def is_correct(line: str) -> bool | None:
    """Return whether a complete sentence, including its " .", is true.

    The result is None if the sentence does not have a form of the dialects. This includes broken grammar ("one
    apples") and values that do not exist ("the thirty first of april"). Years have 365 days, and clocks twelve hours.
    """
    return _match_form(line)[1]


def dialect_of(line: str) -> str | None:
    """Return the dialect of a complete sentence, a key of `DIALECTS`; None if the form is unknown."""
    return _match_form(line)[2]


def prompt_of(line: str) -> str:
    """Return the beginning of a sentence that determines its rest, such as "twelve plus thirty is".

    Raises:
        ValueError: `line` does not have a form of the dialects.
    """
    match, _, _ = _match_form(line)
    if match is None:
        raise ValueError(f"line={line!r} is not a sentence of the dialects {', '.join(DIALECTS)}")
    return line[: match.start(match.lastindex)].rstrip()


def _match_form(line: str) -> tuple[re.Match, bool, str] | tuple[None, None, None]:
    for pattern, (dialect, check) in _FORMS.items():
        match = re.fullmatch(pattern, line)
        if match:
            try:
                return match, check(*match.groups()), dialect
            except (KeyError, ValueError):  # the words in a slot do not have a meaning there
                continue
    return None, None, None


def generate_lines(num_lines: int, seed: int) -> Iterator[str]:
    """Yield `num_lines` sentences with uniformly drawn dialects.

    Sentences may repeat. The same `seed` gives the same sentences on every machine.

    Raises:
        ValueError: `num_lines` is negative.
    """
    if num_lines < 0:
        raise ValueError(f"num_lines={num_lines} is negative; it must be 0 or more")
    rng, dialects = Random(seed), list(DIALECTS.values())
    return (rng.choice(dialects)(rng) for _ in range(num_lines))


def write_demo_corpus(
    folder: str | Path, num_train_lines: int = 10_000, num_valid_lines: int = 600, seed: int = 0
) -> tuple[Path, Path]:
    """Write train.txt and valid.txt (UTF-8) and return their paths.

    Sentences do not repeat within or across the files, so valid.txt is held out. The content of valid.txt does not
    depend on `num_train_lines`.

    Args:
        folder: folder for the files; created if missing.
        num_train_lines: number of training sentences, at least 1.
        num_valid_lines: number of validation sentences, at least 1.
        seed: seed of the sentences and their order.

    Raises:
        ValueError: a number of lines is below 1, or their sum exceeds `MAX_DISTINCT_LINES`.
    """
    if min(num_train_lines, num_valid_lines) < 1 or num_train_lines + num_valid_lines > MAX_DISTINCT_LINES:
        raise ValueError(
            f"num_train_lines={num_train_lines} and num_valid_lines={num_valid_lines}: each must be at least 1 and "
            f"both together at most {MAX_DISTINCT_LINES}"
        )
    rng, dialects = Random(seed), list(DIALECTS.values())
    lines: dict[str, None] = {}  # keeps its order, unlike a set
    while len(lines) < num_valid_lines + num_train_lines:
        dialect = rng.choice(dialects)
        new = (line for _ in range(_MAX_DRAWS) if (line := f"{dialect(rng)}\n") not in lines)
        if (line := next(new, None)) is None:
            raise RuntimeError(f"{dialect.__name__} has too few distinct sentences for MAX_DISTINCT_LINES")
        lines[line] = None
    texts, folder = list(lines), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_path, valid_path = folder / "train.txt", folder / "valid.txt"
    for path, part in ((valid_path, texts[:num_valid_lines]), (train_path, texts[num_valid_lines:])):
        path.write_text("".join(part), encoding="utf-8", newline="\n")
    return train_path, valid_path
