"""The programs in examples/ run offline, on generated text and on the user's files."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--max_steps", "3", "--warmup_steps", "1", "--logging_steps", "1", "--disable_tqdm", "true"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example: the rows of the table that it ends with."""

    def run(name, *arguments):
        output = tmp_path / "output"
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments), "--output", str(output), *SHORT])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        table = capsys.readouterr().out.rpartition("\n\n")[2]
        return {
            row: tuple(map(float, scores)) for row, *scores in re.findall(r"(\S.+?)\s+([\d.]+)\s+([\d.]+)\n", table)
        }

    return run


def write(file, *lines):
    file.write_text("\n".join(lines * 40) + "\n", encoding="utf-8")
    return file


def test_domain_lm(run, tmp_path):
    rows = run("domain_lm.py")
    assert list(rows) == ["general", "fine-tuned", "domain alone"]
    assert all(score > 1 for scores in rows.values() for score in scores)
    # Other steps on other text than before, from the same weights.
    assert rows["fine-tuned"] != rows["general"]


def test_domain_lm_on_files(run, tmp_path):
    general = write(tmp_path / "general.txt", "the cat sleeps on the mat", "a dog sees the cat and runs")
    domain = write(tmp_path / "domain.txt", "two and two is four", "three and one is four")
    rows = run("domain_lm.py", "--general", general, general, "--domain", domain, domain)
    assert len(rows) == 3 and not (tmp_path / "output" / "text").exists()


def test_fine_tune_translator(run, tmp_path):
    rows = run("fine_tune_translator.py")
    assert list(rows) == ["before", "domain", "domain and general"]


def test_fine_tune_a_translator_of_ones_own(run, tmp_path):
    texts = {}
    for name, pair in {"general": ("a dog", "ein Hund"), "domain": ("three o'clock", "drei Uhr")}.items():
        files = [write(tmp_path / f"{name}.{language}", text) for language, text in zip(("en", "de"), pair)]
        texts[name] = [*files, *files]
    arguments = ["--general", *texts["general"], "--domain", *texts["domain"]]
    assert len(run("fine_tune_translator.py", *arguments, "--vocab_size", "280")) == 3
