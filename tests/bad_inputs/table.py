#!/usr/bin/env python3
"""Run every case of bad input, and write the table of docs/design.md.

python tests/bad_inputs/table.py [--output docs/design.md] [KIND ...]
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from bad_inputs import FAULTS, judge  # noqa: E402

START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", metavar="KIND", nargs="*", help="kinds to run, such as arguments (default: all)")
    parser.add_argument("--output", type=Path, help="page whose table to replace")
    options = parser.parse_args()
    titles = ["kind", "cases", *(f"{fault}s" for fault in FAULTS)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    total = Counter()
    for path in sorted(HERE.glob("test_*.py")):
        kind = path.stem.removeprefix("test_")
        cases = getattr(importlib.import_module(path.stem), "CASES", [])
        if cases and (not options.kinds or kind in options.kinds):
            counts = count_faults(kind, cases)
            total += counts
            lines.append(row(kind.replace("_", " "), counts))
    lines.append(row("all", total))
    print("\n".join(lines))
    if options.output:
        page = options.output.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        options.output.write_text("\n".join([before + START, *lines, END + after]), encoding="utf-8")
    return sum(total[fault] for fault in FAULTS) > 0


def count_faults(kind: str, cases: list) -> Counter:
    """Counts the cases and the cases with each fault; prints every fault."""
    counts = Counter(cases=len(cases))
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(case, Path(folder))
        if verdict.fault:
            counts[verdict.fault] += 1
            print(f"{kind}, {case.name}: {verdict.fault}: {verdict.why}", file=sys.stderr)
    return counts


def row(kind: str, counts: Counter) -> str:
    return f"| {kind} | {counts['cases']} | " + " | ".join(str(counts[fault]) for fault in FAULTS) + " |"


if __name__ == "__main__":
    sys.exit(main())
