"""French number words up to 9,999 in the spelling before 1990: "vingt et un", "deux cent trente-quatre".

Only parts below a hundred have hyphens, but not around "et". The spelling of 1990 writes "vingt-et-un"
and "deux-cent-trente-quatre".
"""

import re

LARGEST_NUMBER = 9_999
MONTHS = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split()

_UP_TO_NINETEEN = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
).split()
_TENS = {20: "vingt", 30: "trente", 40: "quarante", 50: "cinquante", 60: "soixante", 80: "quatre-vingt"}


def cardinal(n: int, feminine: bool = False) -> str:
    """Return the cardinal of `n`, 0 to 9,999: "quatre-vingts", "deux cents", "vingt et une" when feminine.

    Raises:
        ValueError: `n` is outside that range.
    """
    words = label(n)
    if n % 100 == 80 or (n % 100 == 0 and n % 1_000 > 100):
        return f"{words}s"
    return f"{words}e" if feminine and re.search(r"\bun$", words) else words


def label(n: int) -> str:
    """Return the number `n`, 0 to 9,999, as a label of a page or year, without agreement: "quatre-vingt", "deux cent".

    Raises:
        ValueError: `n` is outside that range.
    """
    if not 0 <= n <= LARGEST_NUMBER:
        raise ValueError(f"n={n} is outside 0 to {LARGEST_NUMBER}")
    if n < 100:
        return _below_a_hundred(n)
    base, name = (100, "cent") if n < 1_000 else (1_000, "mille")
    count, rest = divmod(n, base)
    return (f"{label(count)} " if count > 1 else "") + name + (f" {label(rest)}" if rest else "")


def ordinal(n: int, feminine: bool = False) -> str:
    """Return the ordinal of `n`, 1 to 9,999: "premier", "première", "deuxième", "vingt et unième".

    Raises:
        ValueError: `n` is outside that range.
    """
    if n == 0:
        raise ValueError(f"n={n} is outside 1 to {LARGEST_NUMBER}")
    if n == 1:
        return "première" if feminine else "premier"
    words = label(n)
    if words.endswith("cinq"):
        return f"{words}uième"
    return f"{words.removesuffix('f')}vième" if words.endswith("neuf") else f"{words.removesuffix('e')}ième"


def date(day: int, month: int) -> str:
    """Return the date for a day and a month, both counted from 1: "premier mars", "trois mars"."""
    return f"{ordinal(1) if day == 1 else cardinal(day)} {MONTHS[month - 1]}"


def clock(minutes: int) -> str:
    """Return the time `minutes` after twelve, 31 to 690: "une heure et quart", "cinq heures moins vingt".

    Raises:
        ValueError: `minutes` is outside that range, where French says "midi" or "minuit".
    """
    if not 31 <= minutes <= 690:
        raise ValueError(f"minutes={minutes} is outside 31 to 690")
    hour, minute = divmod(minutes, 60)
    side = ""
    if minute > 30:
        hour, minute, side = hour + 1, 60 - minute, " moins"
    hours = f"{cardinal(hour, feminine=True)} heure{'s' if hour > 1 else ''}"
    if minute == 0:
        return hours
    if minute in (15, 30):
        return hours + (" et demie" if minute == 30 else " moins le quart" if side else " et quart")
    return f"{hours}{side} {cardinal(minute, feminine=True)}"


def _below_a_hundred(n: int) -> str:
    if n < 20:
        return _UP_TO_NINETEEN[n]
    tens = max(tens for tens in _TENS if tens <= n)
    rest = n - tens
    if rest == 0:
        return _TENS[tens]
    joint = " et " if rest in (1, 11) and tens != 80 else "-"
    return f"{_TENS[tens]}{joint}{_UP_TO_NINETEEN[rest]}"
