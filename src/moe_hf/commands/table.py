"""Print the size and cost of the paper's models (tables 7 and 8, and the translation models) beside this package's.

    moe-hf table [CONFIGS]

CONFIGS is a folder with lm/ and translation/. By default, it is the copy of configs/ that comes with the package. No
model is allocated, even at 137 billion parameters. The exit status is 1 if a row differs from the paper.
"""

from pathlib import Path

from ..errors import InputError
from ..evaluation import count_embedding_parameters, count_parameters, ops_per_timestep
from ..experiments.paper_tables import BILLION_WORDS_1, BILLION_WORDS_100, TRANSLATION, PaperRow, TranslationRow
from ..training.plan_file import read_config
from . import command_parser, run_command
from .parser import path

CONFIGS = Path(__file__).parents[1] / "paper_configs"  # part of the package; configs/ of a checkout links here
LINE = "{:<15}{:>6}{:>12}{:>9}{:>15}{:>12}{:>9}{:>7}  {}"
ROUNDED_DOWN = (
    "\n* The paper's operations are ours rounded down, not to the nearest; see moe_hf/experiments/paper_tables.py."
)


def print_row(row: PaperRow, configs: Path) -> bool:
    """Print one row, and return whether it agrees with the paper."""
    config = read_config(configs / "lm" / row.config)
    ops, params = ops_per_timestep(config), count_parameters(config)
    matches = row.has_ops(ops) and row.has_params(params) and config.dropout == (row.dropout or 0)
    mark = ("✓ *" if row.ops_rounded_down else "✓") if matches else "differs"
    numbers = [config.num_expert_groups or "-", row.mops, f"{ops / 1e6:.3f}", row.mparams, f"{params / 1e6:.3f}"]
    print(LINE.format(row.name, *numbers, config.dropout, row.test_ppl, mark))
    return matches


def print_translation_row(row: TranslationRow, configs: Path) -> bool:
    """Print one row, and return whether it agrees with the paper."""
    config = read_config(configs / "translation" / row.config)
    ops, params = ops_per_timestep(config), count_parameters(config) + count_embedding_parameters(config)
    matches = row.has_ops(ops) and row.has_params(params)
    paper = "-" if row.gparams is None else f"{row.gparams * 1e3:.0f}"
    numbers = [config.num_expert_groups or "-", row.mops, f"{ops / 1e6:.3f}", paper, f"{params / 1e6:.3f}"]
    print(LINE.format(row.name, *numbers, config.dropout, "-", "✓" if matches else "differs"))
    return matches


def print_heads(title: str) -> None:
    names = ("model", "groups", "ops: paper", "ours", "params: paper", "ours", "dropout", "ppl", "")
    print(f"\n{title}\n{LINE.format(*names).rstrip()}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("table", __doc__)
    parser.add_argument("configs", nargs="?", type=path, help="folder with lm/ and translation/")
    matches = []
    status = run_command(lambda: matches.extend(print_tables(find_configs(parser.parse_args(argv).configs))))
    return status or int(not all(matches))


def find_configs(given: Path | None) -> Path:
    """Return the folder given, or the package's folder."""
    folder = given or CONFIGS
    if not ((folder / "lm").is_dir() and (folder / "translation").is_dir()):
        raise InputError(f"configs={folder} has no lm/ and translation/: give configs/ of a checkout of this project")
    return folder


def print_tables(configs: Path) -> list[bool]:
    """Print all rows, and return for each whether it agrees with the paper."""
    matches = []
    for title, rows in (("1 billion words", BILLION_WORDS_1), ("100 billion words", BILLION_WORDS_100)):
        print_heads(f"{title}; in millions, without embedding and softmax; ppl is the paper's")
        matches += [print_row(row, configs) for row in rows]
    print(ROUNDED_DOWN)
    print_heads("translation; in millions, parameters with embedding and softmax; operations to 3 %")
    return matches + [print_translation_row(row, configs) for row in TRANSLATION]
