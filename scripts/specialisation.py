#!/usr/bin/env python3
"""Measure how much the experts of a model tell about the tokens, with random gates as a control (table 9).

    python scripts/specialisation.py LANGUAGE_MODEL FILE [FILE ...] [-o specialisation.md]
    python scripts/specialisation.py TRANSLATOR SOURCE_FILE TARGET_FILE [-o specialisation.md]

Prints a table with three rows for each MoE layer: the trained model, the trained model with random gates, and an
untrained model with random gates. Compare only rows with similar numbers of tokens.
"""

import argparse
import sys

from moe_hf.commands import run_command
from moe_hf.experiments.random_gates import specialisation_table
from moe_hf.writing import check_file, write_file


def main() -> int:
    return run_command(run)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument(
        "files", nargs="+", help="text files, plain, .gz or .xz; two aligned files for a translation model"
    )
    parser.add_argument("-o", "--output", help="file to write the table to as well")
    parser.add_argument("--max_tokens", type=int, default=200_000, help="maximal number of tokens (default: 200000)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the random gates (default: 0 1 2)"
    )
    parser.add_argument("--target_language", help="language of the second file, for a multilingual translation model")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    if output is not None:
        check_file(output, "output")
    table = specialisation_table(**arguments)
    print(table)
    if output is not None:
        write_file(output, table + "\n", "output")


if __name__ == "__main__":
    sys.exit(main())
