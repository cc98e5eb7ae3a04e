"""Every table of benchmarks/results has a line on the page of benchmarks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmarks_page_lists_every_table():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(\.\./benchmarks/results/([\w.-]+\.md)\)", text)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.md"))
