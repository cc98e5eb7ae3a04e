"""The demo corpus: its sentences are true, checkable, reproducible and held out."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from moe_hf.demo import text_corpus as demo_corpus
from moe_hf.demo.number_words import (
    date_in_words,
    number_in_words,
    ordinal_in_words,
    time_in_words,
    words_to_number,
)
from moe_hf.demo.text_corpus import (
    DIALECTS,
    MAX_DISTINCT_LINES,
    PROMPTS,
    dialect_of,
    generate_lines,
    is_correct,
    prompt_of,
    write_demo_corpus,
)


def _lines_of(dialect: str, num_lines: int = 2_000) -> list[str]:
    rng = Random(1)
    return [DIALECTS[dialect](rng) for _ in range(num_lines)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_sentence_is_correct(dialect):
    wrong = [line for line in _lines_of(dialect) if is_correct(line) is not True]
    assert not wrong


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_result_of_another_sentence_is_incorrect(dialect):
    lines = _lines_of(dialect)
    num_false = 0
    for line, other in zip(lines, lines[1:]):
        mixed = prompt_of(line) + other[len(prompt_of(other)) :]
        if mixed != line:
            assert is_correct(mixed) is not True, mixed
            num_false += is_correct(mixed) is False
    assert num_false > len(lines) / 10


@pytest.mark.parametrize(
    "line",
    [
        "forty one , forty two , forty three , forty five .",
        "twelve plus thirty is forty three .",
        "the day after the twenty eighth of february is the second of march .",
        "the day after the thirty first of december is the second of january .",
        "if the third of may is a monday , the fifth of may is a thursday .",
        "half an hour after ten past four it is twenty to four .",
        "from quarter past six until half past six is half an hour .",
        "anna buys two apples for four coins and one cake for eight coins and pays ten coins in all .",
        "anna buys two apples for five coins and one cake for eight coins and pays thirteen coins in all .",
        "c a t spells cat and m o o n spells milk .",
        "fish is spelled f i s h and lamp is spelled l a m .",
    ],
)
def test_false_statements_are_incorrect(line):
    assert is_correct(line) is False


@pytest.mark.parametrize(
    "line",
    [
        "",
        "the cat sat on the mat .",
        "twelve plus thirty is forty two",
        "twelve plus apple is forty two .",
        "the day after the thirty first of april is the second of may .",
        "anna buys one apples for two coins and one cake for eight coins and pays ten coins in all .",
        "anna buys one egg for one coins and one cake for eight coins and pays nine coins in all .",
    ],
)
def test_unknown_and_ungrammatical_sentences_are_neither(line):
    assert is_correct(line) is None


def test_calendar_and_clock_facts_stated_by_hand():
    for line in (
        "the day after the twenty eighth of february is the first of march .",
        "a week before the first of january is the twenty fifth of december .",
        "if the thirty first of december is a sunday , the first of january is a monday .",
        "half an hour after ten past four it is twenty to five .",
        "an hour before half past twelve it is half past eleven .",
        "from five to twelve until twenty five past twelve is half an hour .",
    ):
        assert is_correct(line) is True, line


def test_prompts_cover_every_dialect_and_have_one_true_continuation():
    rng = Random(2)
    for dialect in DIALECTS.values():
        for _ in range(200):
            line = dialect(rng)
            assert line.startswith(prompt_of(line) + " ")
    endings = (
        "forty four . | fifty . | forty two . | forty two . | first of april . | wednesday . | twenty to five . | "
        "a quarter of an hour . | ten coins in all . | moon . | l a m p ."
    ).split(" | ")
    for prompt, ending in zip(PROMPTS, endings, strict=True):
        assert is_correct(f"{prompt} {ending}") is True
        assert prompt_of(f"{prompt} {ending}") == prompt


def test_words_are_few_and_separated_by_single_spaces():
    lines = list(generate_lines(10_000, seed=3))
    vocabulary = {word for line in lines for word in line.split(" ")}
    assert 150 <= len(vocabulary) <= 400
    assert "" not in vocabulary
    assert all(line == line.lower() and line.endswith(" .") for line in lines)


def test_dialects_are_drawn_uniformly(monkeypatch):
    monkeypatch.setattr(demo_corpus, "DIALECTS", {name: lambda rng, name=name: name for name in DIALECTS})
    lines = list(generate_lines(6_000, seed=0))
    assert all(900 < lines.count(name) < 1_100 for name in DIALECTS)


def test_valid_is_held_out_and_nothing_repeats(tmp_path):
    train_path, valid_path = write_demo_corpus(tmp_path / "new" / "folder")
    train, valid = (path.read_text(encoding="utf-8").splitlines() for path in (train_path, valid_path))
    assert (train_path.name, valid_path.name) == ("train.txt", "valid.txt")
    assert (len(train), len(valid)) == (10_000, 600)
    assert len({*train, *valid}) == 10_600


def test_valid_does_not_depend_on_the_number_of_train_lines(tmp_path):
    (_, small), (_, large) = (write_demo_corpus(tmp_path / str(n), n, 50) for n in (10, 300))
    assert small.read_bytes() == large.read_bytes()


def test_the_largest_corpus_can_be_drawn(tmp_path):
    train_path, _ = write_demo_corpus(tmp_path, MAX_DISTINCT_LINES - 100, 100, seed=4)
    assert len(set(train_path.read_text(encoding="utf-8").splitlines())) == MAX_DISTINCT_LINES - 100


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_seed_alone_decides_the_bytes(tmp_path, hash_seed):
    here = write_demo_corpus(tmp_path / "here", 500, 100, seed=7)
    # Imported as training.demo_corpus: the package itself would import transformers, which takes seconds.
    code = "import sys; from demo.text_corpus import write_demo_corpus as write; write(sys.argv[1], 500, 100, 7)"
    package = str(Path(demo_corpus.__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": package}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], env=environment, check=True)
    for path in here:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    other_seed = write_demo_corpus(tmp_path / "other", 500, 100, seed=8)
    assert other_seed[0].read_bytes() != here[0].read_bytes()


def test_generated_lines_depend_on_the_seed():
    assert list(generate_lines(20, seed=5)) == list(generate_lines(20, seed=5))
    assert list(generate_lines(20, seed=5)) != list(generate_lines(20, seed=6))


def test_number_words_round_trip():
    assert [words_to_number(number_in_words(n)) for n in range(1_000)] == list(range(1_000))
    assert number_in_words(105) == "one hundred and five"
    assert number_in_words(999) == "nine hundred and ninety nine"
    assert words_to_number("zero") == 0


def test_ordinals_dates_and_times_in_words():
    assert [date_in_words(day) for day in (0, 58, 59, 364)] == (
        "first of january,twenty eighth of february,first of march,thirty first of december".split(",")
    )
    assert [ordinal_in_words(n) for n in (1, 2, 3, 5, 9, 12, 20, 31)] == (
        "first,second,third,fifth,ninth,twelfth,twentieth,thirty first".split(",")
    )
    assert [time_in_words(minutes) for minutes in (0, 15, 30, 250, 695, 705)] == (
        "twelve o'clock,quarter past twelve,half past twelve,ten past four,twenty five to twelve,"
        "quarter to twelve".split(",")
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: number_in_words(1_000), "n=1000 is outside 0 to 999"),
        (lambda folder: ordinal_in_words(0), "n=0 is outside 1 to 999"),
        (lambda folder: date_in_words(365), "day=365 is outside 0 to 364"),
        (lambda folder: time_in_words(720), "minutes=720 is outside 0 to 719"),
        (lambda folder: words_to_number("forty eleven"), "words='forty eleven' is not a number"),
        (lambda folder: generate_lines(-1, seed=0), "num_lines=-1 is negative"),
        (lambda folder: prompt_of("hello ."), "line='hello .' is not a sentence"),
        (
            lambda folder: write_demo_corpus(folder, 0),
            "num_train_lines=0 and num_valid_lines=600: each must be at least 1",
        ),
        (
            lambda folder: write_demo_corpus(folder, 1, -5),
            "num_train_lines=1 and num_valid_lines=-5: each must be at least 1",
        ),
        (lambda folder: write_demo_corpus(folder, 50_000), "num_train_lines=50000 .* at most 12000"),
    ],
)
def test_errors_name_argument_value_and_range(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


@pytest.mark.parametrize("name", list(DIALECTS))
def test_dialect_of_a_sentence_is_told_by_its_form(name):
    rng = Random(7)
    assert {dialect_of(DIALECTS[name](rng)) for _ in range(200)} == {name}
