"""The README's commands and programs run unchanged, except for tiny sizes appended to the trainings."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from moe_hf import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = shlex.split(
    "--hidden_size 16 --num_experts 4 --num_experts_per_tok 2 --moe_intermediate_size 16 --vocab_size 300 "
    "--max_steps 2 --disable_tqdm true --report_to none --use_cpu true"
)
PAIRS = {
    "A dog runs.": "Ein Hund rennt.",
    "Two men talk.": "Zwei Männer reden.",
    "A cat sleeps.": "Eine Katze schläft.",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Returns the input and the arguments of each `moe-hf` command in the README, without `> FILE`."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [re.match(r'(?:echo "(.*)" \| )?moe-hf (.*?)(?: > [\w.]+.*)?$', line) for line in lines]
    return [(match[1] or "", shlex.split(match[2], comments=True)) for match in found if match]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_text").mkdir()
    english, german = ("".join(f"{line}\n" for line in side) * 200 for side in (PAIRS, PAIRS.values()))
    for name in ("my_text/one.txt", "my_text_valid.txt", "train.en", "valid.en", "test.en"):
        (folder / name).write_text(english, encoding="utf-8")
    for name in ("train.de", "valid.de", "test.de"):
        (folder / name).write_text(german, encoding="utf-8")
    (folder / "english.txt").write_text("A dog runs.\n", encoding="utf-8")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    return folder


@pytest.mark.slow
def test_commands_and_programs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    named = []
    for text, arguments in commands():
        named.append(arguments[0])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        capsys.readouterr()
        status = cli.main(arguments + (TINY if arguments[0].startswith("train") else []))
        printed = capsys.readouterr()
        assert status == 0, (arguments, printed.err)
        if arguments[0] == "translate":
            assert printed.out.count("\n") == 1
    assert named == [
        "--help",
        "translate",
        "translate",
        "train-lm",
        "train-translation",
        "translate",
        "evaluate-translation",
    ]

    generate, translate, layer = blocks("python")
    shipped = 'folder = "model_cards/wikipedia-moe-48"'
    assert shipped in generate
    for program in (generate, generate.replace(shipped, 'folder = "runs/lm"')):
        exec(program, {})
        assert capsys.readouterr().out.startswith("['The first of")
    exec(translate, {})
    assert capsys.readouterr().out.count("translation_text") == 2
    names = {}
    exec(layer, names)
    assert names["block"].gate.weight.grad.abs().sum() > 0


def test_it_is_short_and_says_first_what_to_type():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert re.findall(r"^make [\w-]+", blocks("bash")[0], re.MULTILINE) == ["make demo", "make test"]
    assert lines.index(blocks("bash")[0].splitlines()[0]) < 20


def test_cells_of_the_results_are_short():
    table = README.partition("## Results")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 5 and all(len(row) == 3 for row in rows)
    assert all(len(cell.split()) <= 15 for row in rows for cell in row)


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert len(links) > 15 and [link for link in links if not (ROOT / link).is_file()] == []
