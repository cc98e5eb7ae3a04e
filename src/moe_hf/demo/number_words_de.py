"""German number words up to 9,999, with "einhundert" and "eintausend" in full: "eintausendeinhunderteinundzwanzig"."""

LARGEST_NUMBER = 9_999
MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()

_UP_TO_NINETEEN = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_IRREGULAR_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def cardinal(n: int) -> str:
    """Return the cardinal of `n`, 0 to 9,999, as one word. The number 1 and numbers that end in 01 end in s: "eins".

    Raises:
        ValueError: `n` is outside that range.
    """
    return _stem(n) + ("s" if n % 100 == 1 else "")


def ordinal(n: int, ending: str = "e") -> str:
    """Return the ordinal of `n`, 1 to 9,999: "siebte", "einundzwanzigste"; with the ending "en", "dritten".

    Raises:
        ValueError: `n` is outside that range.
    """
    if not 1 <= n <= LARGEST_NUMBER:
        raise ValueError(f"n={n} is outside 1 to {LARGEST_NUMBER}")
    last = n % 100
    if last in _IRREGULAR_ORDINALS:
        return (_stem(n - last) if n > last else "") + _IRREGULAR_ORDINALS[last] + ending
    return _stem(n) + ("t" if 0 < last < 20 else "st") + ending


def year(n: int) -> str:
    """Return the year `n`, 1100 to 1999, counted in hundreds: "neunzehnhundertvierundachtzig".

    Raises:
        ValueError: `n` is outside that range.
    """
    if not 1_100 <= n <= 1_999:
        raise ValueError(f"n={n} is outside 1100 to 1999")
    century, rest = divmod(n, 100)
    return f"{_stem(century)}hundert" + (cardinal(rest) if rest else "")


def date(day: int, month: int, ending: str = "e") -> str:
    """Return a date: "dritte März".

    Args:
        day: from 1.
        month: from 1.
        ending: ending of the ordinal; "en" gives "dritten März".
    """
    return f"{ordinal(day, ending)} {MONTHS[month - 1]}"


def clock(minutes: int) -> str:
    """Return the time `minutes` after twelve, 0 to 719: "ein Uhr", "Viertel nach eins", "halb zwei", "zehn vor zwei".

    Raises:
        ValueError: `minutes` is outside that range.
    """
    if not 0 <= minutes < 12 * 60:
        raise ValueError(f"minutes={minutes} is outside 0 to {12 * 60 - 1}")
    hour, minute = divmod(minutes, 60)
    if minute == 0:
        return f"{_stem(hour or 12)} Uhr"
    if minute == 30:
        return f"halb {cardinal(hour + 1)}"
    side = "nach"
    if minute > 30:
        hour, minute, side = (hour + 1) % 12, 60 - minute, "vor"
    return f"{'Viertel' if minute == 15 else cardinal(minute)} {side} {cardinal(hour or 12)}"


def _stem(n: int) -> str:
    """Return the cardinal in its form inside a longer word, with "ein" for 1."""
    if not 0 <= n <= LARGEST_NUMBER:
        raise ValueError(f"n={n} is outside 0 to {LARGEST_NUMBER}")
    if n < 20:
        return _UP_TO_NINETEEN[n]
    if n < 100:
        tens, units = divmod(n, 10)
        return (f"{_stem(units)}und" if units else "") + _TENS[tens - 2]
    base, name = (100, "hundert") if n < 1_000 else (1_000, "tausend")
    return f"{_stem(n // base)}{name}" + (_stem(n % base) if n % base else "")
