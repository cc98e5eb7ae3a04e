"""Number words of the translation demo: right by hand, one to one, and read back by parsers that share no code."""

import re

import pytest

from moe_hf.demo import number_words_de as de
from moe_hf.demo import number_words_en as en
from moe_hf.demo import number_words_fr as fr

CARDINALS = """
0 | zero | null | zéro
1 | one | eins | un
6 | six | sechs | six
7 | seven | sieben | sept
12 | twelve | zwölf | douze
16 | sixteen | sechzehn | seize
17 | seventeen | siebzehn | dix-sept
20 | twenty | zwanzig | vingt
21 | twenty-one | einundzwanzig | vingt et un
22 | twenty-two | zweiundzwanzig | vingt-deux
30 | thirty | dreißig | trente
35 | thirty-five | fünfunddreißig | trente-cinq
60 | sixty | sechzig | soixante
61 | sixty-one | einundsechzig | soixante et un
70 | seventy | siebzig | soixante-dix
71 | seventy-one | einundsiebzig | soixante et onze
77 | seventy-seven | siebenundsiebzig | soixante-dix-sept
80 | eighty | achtzig | quatre-vingts
81 | eighty-one | einundachtzig | quatre-vingt-un
90 | ninety | neunzig | quatre-vingt-dix
91 | ninety-one | einundneunzig | quatre-vingt-onze
99 | ninety-nine | neunundneunzig | quatre-vingt-dix-neuf
100 | one hundred | einhundert | cent
101 | one hundred and one | einhunderteins | cent un
180 | one hundred and eighty | einhundertachtzig | cent quatre-vingts
200 | two hundred | zweihundert | deux cents
201 | two hundred and one | zweihunderteins | deux cent un
316 | three hundred and sixteen | dreihundertsechzehn | trois cent seize
480 | four hundred and eighty | vierhundertachtzig | quatre cent quatre-vingts
1000 | one thousand | eintausend | mille
1001 | one thousand and one | eintausendeins | mille un
1100 | one thousand one hundred | eintausendeinhundert | mille cent
2000 | two thousand | zweitausend | deux mille
4020 | four thousand and twenty | viertausendzwanzig | quatre mille vingt
5300 | five thousand three hundred | fünftausenddreihundert | cinq mille trois cents
"""

ORDINALS = """
1 | first | erste | premier | première
2 | second | zweite | deuxième | deuxième
3 | third | dritte | troisième | troisième
4 | fourth | vierte | quatrième | quatrième
5 | fifth | fünfte | cinquième | cinquième
7 | seventh | siebte | septième | septième
8 | eighth | achte | huitième | huitième
9 | ninth | neunte | neuvième | neuvième
12 | twelfth | zwölfte | douzième | douzième
19 | nineteenth | neunzehnte | dix-neuvième | dix-neuvième
20 | twentieth | zwanzigste | vingtième | vingtième
21 | twenty-first | einundzwanzigste | vingt et unième | vingt et unième
30 | thirtieth | dreißigste | trentième | trentième
71 | seventy-first | einundsiebzigste | soixante et onzième | soixante et onzième
80 | eightieth | achtzigste | quatre-vingtième | quatre-vingtième
81 | eighty-first | einundachtzigste | quatre-vingt-unième | quatre-vingt-unième
100 | one hundredth | einhundertste | centième | centième
101 | one hundred and first | einhunderterste | cent unième | cent unième
200 | two hundredth | zweihundertste | deux centième | deux centième
307 | three hundred and seventh | dreihundertsiebte | trois cent septième | trois cent septième
2000 | two thousandth | zweitausendste | deux millième | deux millième
"""

TIMES = """
35 | twenty-five to one | fünfundzwanzig vor eins | une heure moins vingt-cinq
60 | one o'clock | ein Uhr | une heure
65 | five past one | fünf nach eins | une heure cinq
90 | half past one | halb zwei | une heure et demie
105 | quarter to two | Viertel vor zwei | deux heures moins le quart
240 | four o'clock | vier Uhr | quatre heures
255 | quarter past four | Viertel nach vier | quatre heures et quart
265 | twenty-five past four | fünfundzwanzig nach vier | quatre heures vingt-cinq
690 | half past eleven | halb zwölf | onze heures et demie
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split(" | ") for line in table.strip().splitlines()]


@pytest.mark.parametrize(("n", "english", "german", "french"), _rows(CARDINALS))
def test_cardinals(n, english, german, french):
    assert [language.cardinal(int(n)) for language in (en, de, fr)] == [english, german, french]


@pytest.mark.parametrize(("n", "english", "german", "french", "feminine"), _rows(ORDINALS))
def test_ordinals(n, english, german, french, feminine):
    n = int(n)
    assert [en.ordinal(n), de.ordinal(n), fr.ordinal(n), fr.ordinal(n, True)] == [english, german, french, feminine]
    assert de.ordinal(n, "en") == f"{german}n"


@pytest.mark.parametrize(("minutes", "english", "german", "french"), _rows(TIMES))
def test_times(minutes, english, german, french):
    assert [language.clock(int(minutes)) for language in (en, de, fr)] == [english, german, french]


def test_noon_in_english_and_german():
    assert [en.clock(0), en.clock(5), en.clock(715)] == ["twelve o'clock", "five past twelve", "five to twelve"]
    assert [de.clock(0), de.clock(30), de.clock(715)] == ["zwölf Uhr", "halb eins", "fünf vor zwölf"]


def test_french_feminine_agrees_with_one_only():
    numbers = {1: "une", 11: "onze", 21: "vingt et une", 71: "soixante et onze", 81: "quatre-vingt-une", 2: "deux"}
    assert {n: fr.cardinal(n, feminine=True) for n in numbers} == numbers
    assert fr.cardinal(341, feminine=True) == "trois cent quarante et une"
    assert fr.cardinal(280, feminine=True) == "deux cent quatre-vingts"


def test_french_labels_have_no_agreement():
    labels = {80: "quatre-vingt", 200: "deux cent", 1980: "mille neuf cent quatre-vingt", 21: "vingt et un"}
    assert {n: fr.label(n) for n in labels} == labels


def test_years():
    assert [en.year(1984), en.year(1610), en.year(1917)] == [
        "nineteen eighty-four",
        "sixteen ten",
        "nineteen seventeen",
    ]
    assert [de.year(1984), de.year(1601), de.year(1100)] == [
        "neunzehnhundertvierundachtzig",
        "sechzehnhunderteins",
        "elfhundert",
    ]


def test_dates():
    assert [en.date(1, 1), en.date(22, 3)] == ["first of January", "twenty-second of March"]
    assert [de.date(1, 1), de.date(3, 3, "en"), de.date(31, 12)] == [
        "erste Januar",
        "dritten März",
        "einunddreißigste Dezember",
    ]
    assert [fr.date(1, 1), fr.date(2, 2), fr.date(21, 8), fr.date(31, 12)] == [
        "premier janvier",
        "deux février",
        "vingt et un août",
        "trente et un décembre",
    ]


ENGLISH = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split(),
        [*range(20), *range(20, 100, 10)],
    )
)
GERMAN = dict(
    zip(
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
        "siebzehn achtzehn neunzehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split(),
        [*range(20), *range(20, 100, 10)],
    )
)
FRENCH = dict(
    zip(
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize vingt trente "
        "quarante cinquante soixante".split(),
        [*range(17), 20, 30, 40, 50, 60],
    )
)


def _read_english(words: str) -> int:
    total = 0
    for word in words.replace("-", " ").replace(" and ", " ").split(" "):
        if word == "thousand":
            total *= 1_000
        elif word == "hundred":
            total += total % 10 * 99
        else:
            total += ENGLISH[word]
    return total


def _read_german(word: str) -> int:
    if word in GERMAN:
        return GERMAN[word]
    if word == "ein":
        return 1
    for separator, value in (("tausend", 1_000), ("hundert", 100)):
        if separator in word:
            count, rest = word.split(separator)
            return _read_german(count) * value + (_read_german(rest) if rest else 0)
    units, tens = word.split("und")
    return _read_german(units) + GERMAN[tens]


def _read_french(words: str) -> int:
    total, below_a_thousand = 0, 0
    for word in re.split("[ -]", words):
        word = word.removesuffix("s") if word in ("cents", "vingts") else word
        if word == "mille":
            total, below_a_thousand = 1_000 * (below_a_thousand or 1), 0
        elif word == "cent":
            below_a_thousand = 100 * (below_a_thousand or 1)
        elif word == "vingt" and below_a_thousand % 100 == 4:
            below_a_thousand += 76
        elif word != "et":
            below_a_thousand += FRENCH[word]
    return total + below_a_thousand


@pytest.mark.parametrize(("language", "read"), [(en, _read_english), (de, _read_german), (fr, _read_french)])
def test_every_cardinal_is_read_back(language, read):
    assert [read(language.cardinal(n)) for n in range(10_000)] == list(range(10_000))


def test_labels_and_years_are_read_back():
    years = [n for n in range(1_110, 2_000) if n % 100 >= 10]
    assert [_read_french(fr.label(n)) for n in range(10_000)] == list(range(10_000))
    assert [_read_german(de.year(n)) for n in years] == years
    assert [[*map(_read_english, en.year(n).split(" "))] for n in years] == [[*divmod(n, 100)] for n in years]


@pytest.mark.parametrize("language", [en, de, fr])
def test_ordinals_dates_and_times_are_one_to_one(language):
    assert len({language.ordinal(n) for n in range(1, 10_000)}) == 9_999
    assert len({language.date(day, month) for day in range(1, 32) for month in range(1, 13)}) == 31 * 12
    assert len({language.clock(minutes) for minutes in range(31, 691)}) == 660


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(lambda module=module: module.cardinal(10_000), "n=10000 is outside 0 to 9999") for module in (en, de, fr)],
        *[(lambda module=module: module.cardinal(-1), "n=-1 is outside 0 to 9999") for module in (en, de, fr)],
        *[(lambda module=module: module.ordinal(0), "n=0 is outside 1 to 9999") for module in (en, de, fr)],
        (lambda: en.year(1905), "n=1905 is not a year"),
        (lambda: en.year(2010), "n=2010 is not a year"),
        (lambda: de.year(2000), "n=2000 is outside 1100 to 1999"),
        (lambda: en.clock(720), "minutes=720 is outside 0 to 719"),
        (lambda: de.clock(720), "minutes=720 is outside 0 to 719"),
        (lambda: fr.clock(30), "minutes=30 is outside 31 to 690"),
        (lambda: fr.clock(691), "minutes=691 is outside 31 to 690"),
    ],
)
def test_errors_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
