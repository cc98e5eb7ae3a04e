"""The phrases of the translation demo, each in English, German and French.

Each phrase has exactly one correct translation into each other language:

- Phrases do not contain "you" (du, Sie, vous) or "they" (ils, elles).
- Phrases do not contain noon or midnight (twelve o'clock).
- Phrases about today and about an arrival are different sentences, because a French date is "le trois mars" in both.
- Counts that end in 01 are left out, except 1, because German has both "hundertein" and "hunderteins".
"""

from typing import NamedTuple

from . import number_words_de as de
from . import number_words_en as en
from . import number_words_fr as fr


class Phrase(NamedTuple):
    """The same phrase in the three languages; the names of the fields are language codes."""

    en: str
    de: str
    fr: str


class Noun(NamedTuple):
    """The singular and plural of a noun in each language, with its German and French genders: m, f or n."""

    en: str
    en_plural: str
    de_gender: str
    de: str
    de_plural: str
    fr_gender: str
    fr: str
    fr_plural: str


NOUNS = {
    line.split()[0]: Noun(*line.split())
    for line in (
        "apple apples m Apfel Äpfel f pomme pommes",
        "bird birds m Vogel Vögel m oiseau oiseaux",
        "book books n Buch Bücher m livre livres",
        "cat cats f Katze Katzen m chat chats",
        "dog dogs m Hund Hunde m chien chiens",
        "egg eggs n Ei Eier m œuf œufs",
        "flower flowers f Blume Blumen f fleur fleurs",
        "horse horses n Pferd Pferde m cheval chevaux",
        "house houses n Haus Häuser f maison maisons",
        "key keys m Schlüssel Schlüssel f clé clés",
        "lamp lamps f Lampe Lampen f lampe lampes",
        "tree trees m Baum Bäume m arbre arbres",
    )
}
_EURO = Noun("euro", "euros", "m", "Euro", "Euro", "m", "euro", "euros")
_YEAR_OF_AGE = Noun("year", "years", "n", "Jahr", "Jahre", "m", "an", "ans")

SUBJECTS = ("I", "he", "she", "we")
_CLAUSES = {
    "have": (
        "I have, he has, she has, we have",
        "ich habe, er hat, sie hat, wir haben",
        "j'ai, il a, elle a, nous avons",
    ),
    "see": (
        "I see, he sees, she sees, we see",
        "ich sehe, er sieht, sie sieht, wir sehen",
        "je vois, il voit, elle voit, nous voyons",
    ),
    "buy": (
        "I buy, he buys, she buys, we buy",
        "ich kaufe, er kauft, sie kauft, wir kaufen",
        "j'achète, il achète, elle achète, nous achetons",
    ),
    "live": (
        "I live, he lives, she lives, we live",
        "ich wohne, er wohnt, sie wohnt, wir wohnen",
        "j'habite, il habite, elle habite, nous habitons",
    ),
    "arrive": (
        "I arrive, he arrives, she arrives, we arrive",
        "ich komme, er kommt, sie kommt, wir kommen",
        "j'arrive, il arrive, elle arrive, nous arrivons",
    ),
    "be": ("I am, he is, she is, we are", "ich bin, er ist, sie ist, wir sind", "j'ai, il a, elle a, nous avons"),
}
THING_VERBS = ("have", "see", "buy")
_BIRTHS = {
    "he": Phrase("he was born", "er wurde", "il est né"),
    "she": Phrase("she was born", "sie wurde", "elle est née"),
}
CLOCK_EVENTS = {
    "now": Phrase("it is", "es ist", "il est"),
    "train": Phrase("the train leaves at", "der Zug fährt um", "le train part à"),
    "film": Phrase("the film starts at", "der Film beginnt um", "le film commence à"),
    "shop": Phrase("the shop opens at", "der Laden öffnet um", "le magasin ouvre à"),
}


def number(n: int) -> Phrase:
    """Return the cardinal of `n`, 0 to 9,999."""
    return Phrase(en.cardinal(n), de.cardinal(n), fr.cardinal(n))


def room(subject: str, n: int) -> Phrase:
    """Return "she lives in room two hundred"; the French number is without agreement, "la chambre deux cent"."""
    clause = _clause("live", subject)
    return Phrase(
        f"{clause.en} in room {en.cardinal(n)}",
        f"{clause.de} in Zimmer {de.cardinal(n)}",
        f"{clause.fr} la chambre {fr.label(n)}",
    )


def price(n: int) -> Phrase:
    """Return "it costs two hundred euros"."""
    euros = _counted(n, _EURO)
    return Phrase(f"it costs {euros.en}", f"es kostet {euros.de}", f"cela coûte {euros.fr}")


def things(subject: str, verb: str, n: int, noun: str) -> Phrase:
    """Return "she has twenty-one apples".

    Args:
        subject: the subject, one of `SUBJECTS`.
        verb: one of `THING_VERBS`.
        n: the number of things, see `is_countable`.
        noun: one of `NOUNS`.
    """
    clause, objects = _clause(verb, subject), _counted(n, NOUNS[noun])
    return Phrase(*(f"{words} {counted}" for words, counted in zip(clause, objects)))


def age(subject: str, n: int) -> Phrase:
    """Return "she is twenty-one years old"; French uses "to have", "elle a vingt et un ans"."""
    clause, years = _clause("be", subject), _counted(n, _YEAR_OF_AGE)
    return Phrase(f"{clause.en} {years.en} old", f"{clause.de} {years.de} alt", f"{clause.fr} {years.fr}")


def nth_thing(n: int, noun: str) -> Phrase:
    """Return "this is the twenty-first apple"."""
    noun = NOUNS[noun]
    de_article = {"m": "der", "f": "die", "n": "das"}[noun.de_gender]
    fr_article = {"m": "le", "f": "la"}[noun.fr_gender]
    return Phrase(
        f"this is the {en.ordinal(n)} {noun.en}",
        f"das ist {de_article} {de.ordinal(n)} {noun.de}",
        f"c'est {fr_article} {fr.ordinal(n, noun.fr_gender == 'f')} {noun.fr}",
    )


def today(day: int, month: int) -> Phrase:
    """Return "today is the third of March"."""
    return Phrase(
        f"today is the {en.date(day, month)}",
        f"heute ist der {de.date(day, month)}",
        f"aujourd'hui nous sommes le {fr.date(day, month)}",
    )


def arrival(subject: str, day: int, month: int) -> Phrase:
    """Return "she arrives on the third of March"; the German verb is split around the date, "sie kommt am ... an".

    Args:
        subject: the subject, one of `SUBJECTS`.
        day: from 1.
        month: from 1.
    """
    clause = _clause("arrive", subject)
    return Phrase(
        f"{clause.en} on the {en.date(day, month)}",
        f"{clause.de} am {de.date(day, month, 'en')} an",
        f"{clause.fr} le {fr.date(day, month)}",
    )


def birth(subject: str, year: int) -> Phrase:
    """Return "she was born in nineteen eighty-four"; `subject` is "he" or "she", and `year` is as for `en.year`."""
    clause = _BIRTHS[subject]
    return Phrase(
        f"{clause.en} in {en.year(year)}", f"{clause.de} {de.year(year)} geboren", f"{clause.fr} en {fr.label(year)}"
    )


def clock(event: str, minutes: int) -> Phrase:
    """Return "it is quarter past four".

    Args:
        event: one of `CLOCK_EVENTS`.
        minutes: minutes after twelve o'clock, 31 to 690.
    """
    times = (en.clock(minutes), de.clock(minutes), fr.clock(minutes))
    return Phrase(*(f"{clause} {time}" for clause, time in zip(CLOCK_EVENTS[event], times)))


def is_countable(n: int) -> bool:
    """Return whether a phrase can count `n` things."""
    return n == 1 or (n > 0 and n % 100 != 1)


def _counted(n: int, noun: Noun) -> Phrase:
    if not is_countable(n):
        raise ValueError(f"n={n} is not counted; allowed are 1 and the numbers above it that do not end in 01")
    one = {"m": "einen", "f": "eine", "n": "ein"}[noun.de_gender]  # accusative, as in every phrase
    return Phrase(
        f"{en.cardinal(n)} {noun.en if n == 1 else noun.en_plural}",
        f"{one} {noun.de}" if n == 1 else f"{de.cardinal(n)} {noun.de_plural}",
        f"{fr.cardinal(n, noun.fr_gender == 'f')} {noun.fr if n == 1 else noun.fr_plural}",
    )


def _clause(verb: str, subject: str) -> Phrase:
    return Phrase(*(forms.split(", ")[SUBJECTS.index(subject)] for forms in _CLAUSES[verb]))
