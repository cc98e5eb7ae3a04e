#!/usr/bin/env python3
"""Train language models of different capacity or computation per token, as in figure 2 and table 7.

    python scripts/capacity.py configs/reproduction/capacity.yaml [--seeds 1 2] [--only NAME ...] [--name value ...]
    python scripts/capacity.py configs/reproduction/computation.yaml

The configuration's `variants` are the models, its `references` models of Transformers on the same tokens; every
argument of scripts/train_lm.py can be given for all of them.
Finished runs in output_dir are kept and a killed one goes on, so the same command can be given again, also in several
processes at once with different --only. Writes capacity.md, capacity.csv and capacity.png into output_dir, of all the
models that are finished.
"""

import sys
from pathlib import Path

from moe_hf.errors import InputError, run_command
from moe_hf.evaluation.capacity_report import CapacityRow, add_run, capacity_table, plot_capacity, write_history
from moe_hf.training.arguments import DataArguments, ModelArguments, MoeTrainingArguments, parse_arguments
from moe_hf.training.sweep import SweepArguments, is_finished, train_references, train_variants, with_shared_tokenizer


def main() -> int:
    return run_command(run)


def run() -> None:
    classes = (ModelArguments, DataArguments, MoeTrainingArguments, SweepArguments)
    model_args, data_args, training_args, sweep_args = parse_arguments(dataclasses_=classes)
    if not data_args.validation_files:
        raise InputError("validation_files is empty: the table is measured on validation text")
    variants, references = sweep_args.chosen()
    data_args = with_shared_tokenizer(data_args, training_args)
    for _ in train_variants(model_args, data_args, training_args, variants, sweep_args.seeds):
        pass
    for _ in train_references(data_args, training_args, references, sweep_args.seeds):
        pass
    folder, rows = Path(training_args.output_dir), {}
    for name in [*sweep_args.variants, *sweep_args.references]:
        for seed in sweep_args.seeds:
            if is_finished(run_folder := folder / f"{name}-seed{seed}"):
                add_run(rows, name, seed, run_folder)
    write_report(list(rows.values()), folder)


def write_report(rows: list[CapacityRow], folder: Path) -> None:
    table = capacity_table(rows, baseline="MoE-1-Wide" if any(r.name == "MoE-1-Wide" for r in rows) else rows[0].name)
    print(table)
    (folder / "capacity.md").write_text(table + "\n", encoding="utf-8")
    write_history(rows, folder / "capacity.csv")
    plot_capacity(rows, folder / "capacity.png")


if __name__ == "__main__":
    sys.exit(main())
