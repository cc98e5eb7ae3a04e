#!/usr/bin/env python3
"""Print size and cost of the paper's language models (its tables 7 and 8) beside those of configs/lm.

    python scripts/paper_table.py

Nothing is allocated, for 137 billion parameters neither. Exit status 1 when a row is not the paper's.
"""

import sys
from pathlib import Path

from moe_hf import LstmMoeConfig
from moe_hf.evaluation import count_parameters, ops_per_timestep
from moe_hf.evaluation.paper_tables import BILLION_WORDS_1, BILLION_WORDS_100, PaperRow
from moe_hf.training.arguments import parse_arguments

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "lm"
LINE = "{:<15}{:>6}{:>12}{:>9}{:>15}{:>12}{:>9}{:>7}  {}"
ROUNDED_DOWN = (
    "\n* The paper's operations are ours rounded down, not to the nearest; see moe_hf/evaluation/paper_tables.py."
)


def read_config(path: Path) -> LstmMoeConfig:
    """The model that a file for scripts/train_lm.py describes."""
    model_args, data_args, _ = parse_arguments([str(path), "--use_cpu", "true"])
    return LstmMoeConfig(vocab_size=data_args.vocab_size, **model_args.config_arguments())


def print_row(row: PaperRow) -> bool:
    """Print one row, and tell whether it is the paper's."""
    config = read_config(CONFIGS / row.config)
    ops, params = ops_per_timestep(config), count_parameters(config)
    matches = row.has_ops(ops) and row.has_params(params) and config.dropout == (row.dropout or 0)
    mark = ("✓ *" if row.ops_rounded_down else "✓") if matches else "differs"
    numbers = [config.num_expert_groups or "-", row.mops, f"{ops / 1e6:.3f}", row.mparams, f"{params / 1e6:.3f}"]
    print(LINE.format(row.name, *numbers, config.dropout, row.test_ppl, mark))
    return matches


def main() -> int:
    matches = []
    for title, rows in (("1 billion words", BILLION_WORDS_1), ("100 billion words", BILLION_WORDS_100)):
        print(f"\n{title}; in millions, without embedding and softmax; ppl is the paper's")
        print(
            LINE.format(
                "model", "groups", "ops: paper", "ours", "params: paper", "ours", "dropout", "ppl", ""
            ).rstrip()
        )
        matches += [print_row(row) for row in rows]
    print(ROUNDED_DOWN)
    return 0 if all(matches) else 1


if __name__ == "__main__":
    sys.exit(main())
