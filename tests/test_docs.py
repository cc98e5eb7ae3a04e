"""Everything that the documents name exists."""

import re
from pathlib import Path

import pytest

from moe_hf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "reproduction").glob("*.md")),
]
MAP = ROOT / "docs" / "paper-to-code.md"
FILE = r"[\w./-]+\.(?:py|yaml|md|png|txt)"


def find(path: str) -> Path | None:
    """A file named from the root or from the package."""
    return next((place / path for place in (ROOT, ROOT / "src" / "moe_hf") if (place / path).is_file()), None)


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`({FILE}:[\w.]+)`", MAP.read_text(encoding="utf-8")))))
def test_the_map_names_what_is_defined_there(name):
    path, _, qualified = name.partition(":")
    assert find(path), name
    text = find(path).read_text(encoding="utf-8")
    for part in qualified.split("."):
        assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b", text, flags=re.M), name


def test_the_map_has_every_test_in_one_cell_of_its_rows():
    rows = [line for line in MAP.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| the paper |")]
    assert len(rows) > 30
    assert all(re.search(r"tests/(\w+/)?test_", row.split(" | ")[2]) or "docs/" in row.split(" | ")[2] for row in rows)


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_scripts_benchmarks_and_configurations_named_exist(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w/$}}])((?:scripts|benchmarks|configs|tests|docs)/{FILE})", text)
    missing = [path for path in set(named) if not (ROOT / path).is_file()]
    if document.name == "LOG.md":  # a history, which names earlier scripts
        missing = [path for path in missing if not path.startswith("scripts/")]
    assert not missing, missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_commands_named_exist(document):
    named = re.findall(r"\bmoe-hf ([a-z][\w-]*)", document.read_text(encoding="utf-8"))
    assert set(named) <= COMMANDS.keys()
