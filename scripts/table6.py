#!/usr/bin/env python3
"""Train one small model with each pair of balancing coefficients of the paper's table 6, and write that table.

    python scripts/table6.py configs/reproduction/table6.yaml [--seeds 1 2] [--name value ...]

Arguments of `moe-hf train-lm` apply to all models. The same command can be repeated: it skips finished runs in
output_dir and resumes a stopped run. It writes table6.md, table6.csv and table6.png into output_dir.
"""

import sys
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.data.arguments import DataArguments
from moe_hf.errors import InputError
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.experiments.balance_report import TABLE_6, BalanceRow, balance_table, plot_balance
from moe_hf.experiments.run_curves import write_curves
from moe_hf.experiments.sweep import SweepArguments, train_runs, variant_runs, with_shared_tokenizer
from moe_hf.extra_packages import require_packages
from moe_hf.run_folder import HISTORY_FILE
from moe_hf.training.arguments import LmModelArguments, MoeTrainingArguments, parse_arguments
from moe_hf.writing import check_folder, whole_files


def main() -> int:
    return run_command(run)


def run() -> None:
    require_packages("matplotlib")  # fails here instead of after the training
    classes = (LmModelArguments, DataArguments, MoeTrainingArguments, SweepArguments)
    model_args, data_args, training_args, sweep_args = parse_arguments(sys.argv[1:], classes)
    if sweep_args.variants or sweep_args.only:
        raise InputError("variants and only cannot be given: the rows of the table are the variants")
    if not data_args.validation_files:
        raise InputError("validation_files is empty: the table is measured on validation text")
    check_folder(training_args.output_dir, "output_dir")
    data_args = with_shared_tokenizer(data_args, training_args)
    rows = {f"importance{w_i:g}-load{w_l:g}": BalanceRow(w_i, w_l) for w_i, w_l in TABLE_6}
    variants = {
        name: {"importance_loss_coef": row.w_importance, "load_loss_coef": row.w_load} for name, row in rows.items()
    }
    for trained in train_runs(variant_runs(model_args, data_args, training_args, variants, sweep_args.seeds)):
        metrics = evaluate_lm(
            str(trained.folder),
            data_args.validation_files,
            window_length=data_args.window_length,
            carry_state=data_args.carry_state,
            batch_size=training_args.per_device_eval_batch_size,
        )
        rows[trained.name].add(trained.seed, metrics, trained.folder / HISTORY_FILE)
    if training_args.process_index == 0:
        write_report(rows, Path(training_args.output_dir))


def write_report(rows: dict[str, BalanceRow], folder: Path) -> None:
    table = balance_table(list(rows.values()))
    print(table)
    histories = {
        (name, seed): curves for name, row in rows.items() for seed, curves in zip(row.seeds, row.curves, strict=True)
    }
    with whole_files(folder, "output_dir") as inside:
        (inside / "table6.md").write_text(table + "\n", encoding="utf-8")
        write_curves(inside / "table6.csv", histories)
        plot_balance(list(rows.values()), inside / "table6.png")


if __name__ == "__main__":
    sys.exit(main())
