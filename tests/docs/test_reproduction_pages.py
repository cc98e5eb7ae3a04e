"""The pages of the paper's claims and the log of experiments: form, links, and the index of the log."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
INDEX = DOCS / "reproduction" / "index.md"
README = DOCS.parent / "README.md"
PAGES = sorted(path for path in (DOCS / "reproduction").glob("*.md") if path != INDEX)
LOG = DOCS / "LOG.md"
ENTRY = re.compile(r"^## ((\d{4}-\d\d-\d\d) \[(\w+)\] (.+))$", re.M)


def tables(text: str) -> list[list[list[str]]]:
    """Each table as its rows of cells, the line below the header left out."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    return [[row.strip("|").split("|") for row in block.splitlines() if "---" not in row] for block in blocks]


def anchor(heading: str) -> str:
    """Returns the anchor that both GitHub and mkdocs give a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", heading.lower()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_a_command_a_table_plots_and_three_bullets(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```bash") == 1
    # A second plot is for a rule that spans several comparisons.
    assert 1 <= len(re.findall(r"^!\[.+\]\(results/.+\.png\)$", text, flags=re.M)) <= 2
    bullets = re.findall(r"^- \*\*(.+?):\*\*", text, flags=re.M)
    assert bullets == ["Holds", "Does not hold", "Why"]
    (table,) = tables(text)
    assert len({len(row) for row in table}) == 1
    assert max(len(cell.split()) for row in table for cell in row) <= 15


def test_the_overview_has_four_short_columns_and_every_page():
    text = INDEX.read_text(encoding="utf-8")
    (table,) = tables(text)
    assert {len(row) for row in table} == {4}
    assert max(len(cell.split()) for row in table for cell in row) <= 15
    assert all(re.search(r"\(.+\.md\)", row[3]) for row in table[1:])
    # The page of an aim that is not the paper's is linked below the table.
    assert sorted(set(re.findall(r"\]\(([\w-]+\.md)\)", text))) == [page.name for page in PAGES]


@pytest.mark.parametrize("path", [INDEX, README], ids=["index.md", "README.md"])
def test_a_verdict_is_one_of_three_with_a_condition(path):
    (table,) = [table for table in tables(path.read_text(encoding="utf-8")) if " verdict " in table[0]]
    for row in table[1:]:
        assert re.fullmatch(r"holds|holds in part \(.+\)|does not hold", row[2].strip()), row


@pytest.mark.parametrize("page", [*PAGES, INDEX, LOG], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    anchors = {anchor(match[0]) for match in ENTRY.findall(LOG.read_text(encoding="utf-8"))}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        path, _, part = link.partition("#")
        if not path.startswith("https://"):
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), link
            assert not part or (target == LOG and part in anchors), link


def test_each_entry_of_the_log_has_a_verdict_and_the_four_headings():
    _, *entries = re.split(r"^(?=## \d{4})", LOG.read_text(encoding="utf-8"), flags=re.M)
    for entry in entries:
        assert ENTRY.match(entry), entry[:80]
        assert ENTRY.match(entry)[3] in ("positive", "negative", "null"), entry[:80]
        assert re.findall(r"^### (.+)$", entry, flags=re.M) == ["Question", "Command", "Result", "Learnt"], entry[:80]


def test_the_index_of_the_log_lists_its_entries_newest_first():
    text = LOG.read_text(encoding="utf-8")
    entries = ENTRY.findall(text)
    index = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(#(.+)\) \| (\w+) \|$", text, flags=re.M)
    assert index == [(date, title, anchor(heading), verdict) for heading, date, verdict, title in entries]
    dates = [date for date, *_ in index]
    assert dates == sorted(dates, reverse=True)
