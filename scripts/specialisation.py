#!/usr/bin/env python3
"""Measure how much the experts of a model tell about the tokens, beside gates drawn at random (table 9's control).

    python scripts/specialisation.py LANGUAGE_MODEL FILE [FILE ...] [-o specialisation.md]
    python scripts/specialisation.py TRANSLATOR SOURCE_FILE TARGET_FILE [-o specialisation.md]

Prints a table: for each MoE layer the trained model, the same with gates drawn at random, and an untrained model with
gates drawn. Compare only rows of as many tokens.
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
    parser.add_argument("files", nargs="+", help="text files: plain, .gz, .xz; for a translation model two, aligned")
    parser.add_argument("-o", "--output", help="file to write the table to as well")
    parser.add_argument("--max_tokens", type=int, default=200_000, help="read at most (default: 200000)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gates drawn at random (default: 0 1 2)"
    )
    parser.add_argument("--target_language", help="multilingual translation models: the language of the second file")
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
