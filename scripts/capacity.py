#!/usr/bin/env python3
"""Train language models of different capacity or computation per token, as in figure 2 and table 7.

    python scripts/capacity.py configs/reproduction/capacity.yaml [--seeds 1 2] [--only NAME ...] [--name value ...]
    python scripts/capacity.py configs/reproduction/computation.yaml

The `variants` of the configuration are the models. Its `baselines` are models of Transformers, trained on the same
tokens. Arguments of `moe-hf train-lm` apply to all models.

The same command can be repeated: it skips finished runs in output_dir and resumes a stopped run. Several processes can
run it at the same time with different --only. It writes capacity.md, capacity.csv and capacity.png into output_dir,
for all models that are finished with the given seeds.
"""

import sys
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.data.arguments import DataArguments
from moe_hf.errors import InputError
from moe_hf.experiments.capacity_report import CapacityRow, add_run, capacity_table, plot_capacity
from moe_hf.experiments.run_curves import write_curves
from moe_hf.experiments.sweep import SweepArguments, baseline_runs, train_runs, variant_runs, with_shared_tokenizer
from moe_hf.extra_packages import require_packages
from moe_hf.training.arguments import LmModelArguments, MoeTrainingArguments, parse_arguments
from moe_hf.writing import check_folder, whole_files


def main() -> int:
    return run_command(run)


def run() -> None:
    require_packages("matplotlib")  # fails here instead of after the training
    classes = (LmModelArguments, DataArguments, MoeTrainingArguments, SweepArguments)
    model_args, data_args, training_args, sweep_args = parse_arguments(sys.argv[1:], classes)
    if not data_args.validation_files:
        raise InputError("validation_files is empty: the table is measured on validation text")
    check_folder(training_args.output_dir, "output_dir")
    sweep_args.check_names()
    data_args = with_shared_tokenizer(data_args, training_args)
    runs = variant_runs(model_args, data_args, training_args, sweep_args.variants, sweep_args.seeds)
    runs += baseline_runs(data_args, training_args, sweep_args.baselines, sweep_args.seeds)
    rows = {}
    for trained in train_runs(runs, sweep_args.only):
        add_run(rows, trained.name, trained.seed, trained.folder, trained.tokens_per_step)
    if training_args.process_index == 0:
        write_report(list(rows.values()), Path(training_args.output_dir))


def write_report(rows: list[CapacityRow], folder: Path) -> None:
    table = capacity_table(
        rows, compared_with="MoE-1-Wide" if any(r.name == "MoE-1-Wide" for r in rows) else rows[0].name
    )
    print(table)
    histories = {(row.name, seed): curves for row in rows for seed, curves in zip(row.seeds, row.curves, strict=True)}
    with whole_files(folder, "output_dir") as inside:
        (inside / "capacity.md").write_text(table + "\n", encoding="utf-8")
        write_curves(inside / "capacity.csv", histories)
        plot_capacity(rows, inside / "capacity.png")


if __name__ == "__main__":
    sys.exit(main())
