"""The corpus of the translation demo: right, one to one, aligned, held out and reproducible."""

import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from moe_hf.demo import number_words_en as en
from moe_hf.demo import pair_corpus as corpus
from moe_hf.demo import phrases
from moe_hf.demo.pair_corpus import SHOWN_LINES, generate_phrases, write_translation_corpus
from moe_hf.errors import InputError

THINGS = """
she have 21 apple | she has twenty-one apples | sie hat einundzwanzig Äpfel | elle a vingt et une pommes
she have 1 apple | she has one apple | sie hat einen Apfel | elle a une pomme
I have 1 cat | I have one cat | ich habe eine Katze | j'ai un chat
he see 1 house | he sees one house | er sieht ein Haus | il voit une maison
we buy 2 horse | we buy two horses | wir kaufen zwei Pferde | nous achetons deux chevaux
I buy 80 egg | I buy eighty eggs | ich kaufe achtzig Eier | j'achète quatre-vingts œufs
I see 200 bird | I see two hundred birds | ich sehe zweihundert Vögel | je vois deux cents oiseaux
he buy 71 flower | he buys seventy-one flowers | er kauft einundsiebzig Blumen | il achète soixante et onze fleurs
we see 81 key | we see eighty-one keys | wir sehen einundachtzig Schlüssel | nous voyons quatre-vingt-une clés
we have 30 tree | we have thirty trees | wir haben dreißig Bäume | nous avons trente arbres
he have 12 dog | he has twelve dogs | er hat zwölf Hunde | il a douze chiens
she see 16 book | she sees sixteen books | sie sieht sechzehn Bücher | elle voit seize livres
she buy 7 lamp | she buys seven lamps | sie kauft sieben Lampen | elle achète sept lampes
"""
OTHERS = [
    (phrases.number(1), "one | eins | un"),
    (phrases.room("she", 200), "she lives in room two hundred | sie wohnt in Zimmer zweihundert | "
     "elle habite la chambre deux cent"),
    (phrases.room("I", 1), "I live in room one | ich wohne in Zimmer eins | j'habite la chambre un"),
    (phrases.room("we", 80), "we live in room eighty | wir wohnen in Zimmer achtzig | "
     "nous habitons la chambre quatre-vingt"),
    (phrases.price(1), "it costs one euro | es kostet einen Euro | cela coûte un euro"),
    (phrases.price(300), "it costs three hundred euros | es kostet dreihundert Euro | cela coûte trois cents euros"),
    (phrases.price(81), "it costs eighty-one euros | es kostet einundachtzig Euro | cela coûte quatre-vingt-un euros"),
    (phrases.age("I", 1), "I am one year old | ich bin ein Jahr alt | j'ai un an"),
    (phrases.age("he", 80), "he is eighty years old | er ist achtzig Jahre alt | il a quatre-vingts ans"),
    (phrases.age("we", 21), "we are twenty-one years old | wir sind einundzwanzig Jahre alt | "
     "nous avons vingt et un ans"),
    (phrases.nth_thing(1, "apple"), "this is the first apple | das ist der erste Apfel | c'est la première pomme"),
    (phrases.nth_thing(1, "egg"), "this is the first egg | das ist das erste Ei | c'est le premier œuf"),
    (phrases.nth_thing(8, "flower"), "this is the eighth flower | das ist die achte Blume | c'est la huitième fleur"),
    (phrases.nth_thing(21, "horse"), "this is the twenty-first horse | das ist das einundzwanzigste Pferd | "
     "c'est le vingt et unième cheval"),
    (phrases.today(1, 3), "today is the first of March | heute ist der erste März | "
     "aujourd'hui nous sommes le premier mars"),
    (phrases.today(30, 8), "today is the thirtieth of August | heute ist der dreißigste August | "
     "aujourd'hui nous sommes le trente août"),
    (phrases.arrival("she", 3, 3), "she arrives on the third of March | sie kommt am dritten März an | "
     "elle arrive le trois mars"),
    (phrases.arrival("I", 1, 2), "I arrive on the first of February | ich komme am ersten Februar an | "
     "j'arrive le premier février"),
    (phrases.birth("she", 1984), "she was born in nineteen eighty-four | "
     "sie wurde neunzehnhundertvierundachtzig geboren | elle est née en mille neuf cent quatre-vingt-quatre"),
    (phrases.birth("he", 1780), "he was born in seventeen eighty | er wurde siebzehnhundertachtzig geboren | "
     "il est né en mille sept cent quatre-vingt"),
    (phrases.clock("now", 60), "it is one o'clock | es ist ein Uhr | il est une heure"),
    (phrases.clock("train", 270), "the train leaves at half past four | der Zug fährt um halb fünf | "
     "le train part à quatre heures et demie"),
    (phrases.clock("film", 45), "the film starts at quarter to one | der Film beginnt um Viertel vor eins | "
     "le film commence à une heure moins le quart"),
    (phrases.clock("shop", 560), "the shop opens at twenty past nine | der Laden öffnet um zwanzig nach neun | "
     "le magasin ouvre à neuf heures vingt"),
]  # fmt: skip


@pytest.fixture(scope="module")
def train():
    return generate_phrases(12_000, held_out=False, seed=0)


@pytest.fixture(scope="module")
def valid():
    return generate_phrases(300, held_out=True, seed=0)


@pytest.mark.parametrize("row", THINGS.strip().splitlines())
def test_counted_things_agree(row):
    meaning, *expected = row.split(" | ")
    subject, verb, n, noun = meaning.split()
    assert list(phrases.things(subject, verb, int(n), noun)) == expected


@pytest.mark.parametrize(("phrase", "expected"), OTHERS)
def test_phrases(phrase, expected):
    assert " | ".join(phrase) == expected


def test_a_text_of_one_language_has_one_meaning():
    """Every value in every template; the counts of things with one subject and noun, and those with a few counts."""
    counts = [n for n in range(10_000) if phrases.is_countable(n)]
    dates = corpus._DATES
    everything = [
        *map(phrases.number, range(10_000)),
        *(phrases.room("he", n) for n in range(1, 10_000)),
        *(phrases.room(subject, n) for subject in ("I", "she", "we") for n in (1, 2, 80, 4321)),
        *map(phrases.price, counts),
        *(phrases.things("I", "have", n, "key") for n in counts if n < 1_000 and n not in (1, 2, 80)),
        *(phrases.things(*args) for args in product(phrases.SUBJECTS, phrases.THING_VERBS, (1, 2, 80), phrases.NOUNS)),
        *(phrases.age(subject, n) for subject in phrases.SUBJECTS for n in range(1, 100)),
        *(phrases.nth_thing(n, noun) for n in range(1, 1_000) for noun in ("apple", "tree")),
        *(phrases.nth_thing(n, noun) for n in (1, 2, 80) for noun in phrases.NOUNS if noun not in ("apple", "tree")),
        *(phrases.today(*date) for date in dates),
        *(phrases.arrival(subject, *date) for subject in phrases.SUBJECTS for date in dates),
        *(phrases.birth(subject, n) for subject in ("he", "she") for n in range(1_110, 2_000) if n % 100 >= 10),
        *(phrases.clock(event, minutes) for event in phrases.CLOCK_EVENTS for minutes in range(35, 691, 5)),
    ]
    for texts in zip(*everything):
        assert len(set(texts)) == len(texts) > 35_000


MONTHS = "January February March April May June July August September October November December"
NUMBER_OF_WORDS = {en.cardinal(n): n for n in range(10_000)}
NUMBER_OF_WORDS |= {en.ordinal(n): n for n in range(1, 1_000)}
NUMBER_OF_WORDS |= {en.year(n): n for n in range(1_110, 2_000) if n % 100 >= 10}
FRAMES = [
    r"(?:I|he|she|we) lives? in room (.+)",
    r"it costs (.+) euros?",
    r"(?:I|he|she|we) (?:have|has|sees?|buys?) (.+) [a-z]+",
    r"(?:I|he|she|we) (?:am|is|are) (.+) years? old",
    r"this is the (.+) [a-z]+",
    r"today is the (.+ of [A-Z][a-z]+)",
    r"(?:I|he|she|we) arrives? on the (.+ of [A-Z][a-z]+)",
    r"s?he was born in (.+)",
    r"(?:it is|the [a-z]+ [a-z]+ at) (.+)",
]


def _value(phrase: phrases.Phrase) -> int | str:
    """Returns a phrase's number, or the words of its date or time, from only the English text."""
    found = [match[1] for frame in FRAMES if (match := re.fullmatch(frame, phrase.en))] or [phrase.en]
    assert len(found) == 1
    is_date_or_time = re.search(rf" of ({MONTHS.replace(' ', '|')})$| past | to | o'clock$", found[0])
    return found[0] if is_date_or_time else NUMBER_OF_WORDS[found[0]]


@pytest.mark.parametrize("seed", [0, 1])
def test_values_of_validation_phrases_occur_in_no_training_phrase(seed):
    train_values = {_value(phrase) for phrase in generate_phrases(5_000, held_out=False, seed=seed)}
    valid_values = {_value(phrase) for phrase in generate_phrases(300, held_out=True, seed=seed)}
    assert not train_values & valid_values
    assert len(valid_values) > 100
    # The numbers of days and minutes are training values.
    assert min(value for value in valid_values if isinstance(value, int)) > 31


def test_shown_lines_are_held_out(train):
    shown_values = {_value(phrase) for phrase in SHOWN_LINES}
    assert not shown_values & {_value(phrase) for phrase in train}
    assert {_value(phrase) for phrase in SHOWN_LINES if isinstance(_value(phrase), int)} <= corpus.HELD_OUT_NUMBERS


GERMAN_PARTS = re.compile(
    "null|ein|eins|zwei|drei|vier|fünf|sechs|sieben|acht|neun|zehn|elf|zwölf|sech|sieb|zwanzig|zig|ßig|hundert|tausend|"
    "und|erst|dritt|ste|te|sten|ten|e|en|s"
)
GERMAN_NUMBER = re.compile(rf"(?:{GERMAN_PARTS.pattern})+")


def _parts(language: str, text: str) -> set[str]:
    """Words, the words that hyphens and apostrophes join, and the morphemes of German numbers."""
    words = re.split("[ '-]", text)
    if language == "de":
        words = [
            part
            for word in words
            for part in (GERMAN_PARTS.findall(word) if GERMAN_NUMBER.fullmatch(word) else [word])
        ]
    return set(words)


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_every_part_of_a_validation_phrase_occurs_in_training(language, train, valid):
    train_parts, valid_parts = (
        {part for phrase in some for part in _parts(language, getattr(phrase, language))}
        for some in (train, [*valid, *SHOWN_LINES, *generate_phrases(2_000, held_out=True, seed=3)])
    )
    assert valid_parts <= train_parts
    assert 80 < len(train_parts) < 180


def test_every_kind_of_phrase_is_frequent(train, valid):
    for some, smallest_share in ((train, 0.02), (valid, 0.04)):
        kinds = Counter(next((f for f in FRAMES if re.fullmatch(f, phrase.en)), "number") for phrase in some)
        assert len(kinds) == len(FRAMES) + 1
        assert min(kinds.values()) > smallest_share * len(some)


def test_lines_are_short_composed_and_separated_by_single_spaces(train, valid):
    for line in {line for phrase in [*train, *valid] for line in phrase}:
        assert line == unicodedata.normalize("NFC", line)
        assert 1 <= len(line.split(" ")) <= 12 and all(line.split(" "))


def test_files_are_aligned_and_without_repetition(tmp_path):
    paths = write_translation_corpus(tmp_path / "new" / "folder", num_train_lines=500, num_valid_lines=50, seed=5)
    assert {path.name for part in paths.values() for path in part.values()} == {
        f"{part}.{language}" for part in ("train", "valid") for language in ("en", "de", "fr")
    }
    for part, num_lines, held_out in (("train", 500, False), ("valid", 50, True)):
        texts = [paths[part][language].read_text(encoding="utf-8").splitlines() for language in ("en", "de", "fr")]
        assert list(zip(*texts)) == generate_phrases(num_lines, held_out, seed=5)
        assert all(len(set(lines)) == num_lines for lines in texts)


def test_default_sizes(tmp_path):
    paths = write_translation_corpus(tmp_path)
    sizes = [len(paths[part]["fr"].read_text(encoding="utf-8").splitlines()) for part in ("train", "valid")]
    assert sizes == [12_000, 300]


def test_valid_does_not_depend_on_the_number_of_train_lines(tmp_path):
    small, large = (write_translation_corpus(tmp_path / str(n), n, 50)["valid"] for n in (10, 300))
    assert all(small[language].read_bytes() == large[language].read_bytes() for language in corpus.LANGUAGES)


def test_the_largest_corpus_can_be_drawn():
    assert len(set(generate_phrases(corpus.MAX_TRAIN_LINES, held_out=False, seed=0))) == corpus.MAX_TRAIN_LINES
    assert len(set(generate_phrases(corpus.MAX_VALID_LINES, held_out=True, seed=0))) == corpus.MAX_VALID_LINES


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_seed_alone_decides_the_phrases(hash_seed):
    # The modules are imported below a bare package: the real one would import transformers, which takes seconds.
    code = (
        "import sys, types; package = types.ModuleType('moe_hf'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['moe_hf'] = package; from moe_hf.demo.pair_corpus import generate_phrases; "
        "sys.stdout.buffer.write(repr([generate_phrases(200, side, 7) for side in (False, True)]).encode())"
    )
    package = str(Path(corpus.__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    there = subprocess.run([sys.executable, "-c", code, package], env=environment, check=True, capture_output=True)
    assert there.stdout.decode() == repr([generate_phrases(200, side, 7) for side in (False, True)])
    assert generate_phrases(200, False, 7) != generate_phrases(200, False, 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_train_lines": 0}, "num_train_lines=0 is outside 1 to 20000"),
        ({"num_train_lines": 20_001}, "num_train_lines=20001 is outside 1 to 20000"),
        ({"num_valid_lines": -5}, "num_valid_lines=-5 is outside 1 to 2000"),
    ],
)
def test_a_wrong_size_is_refused_before_anything_is_written(tmp_path, sizes, message):
    with pytest.raises(InputError, match=message):
        write_translation_corpus(tmp_path / "corpus", **sizes)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("n", [0, 101, 1001])
def test_counts_on_which_usage_wavers_are_refused(n):
    with pytest.raises(ValueError, match=f"n={n} is not counted"):
        phrases.price(n)
