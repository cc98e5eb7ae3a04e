#!/usr/bin/env python3
"""Train translation models with the same computation per token and compare them, as in tables 2, 3 and 5.

    python scripts/compare_translation.py configs/reproduction/multilingual.yaml [--seeds 1 2] [--only NAME ...]

The `variants` of the configuration are the models; the others are compared with the first model. Its `baselines` are
models of Transformers, trained on the same batches. Arguments of `moe-hf train-translation` apply to all models.

The same command can be repeated: it skips finished runs in output_dir and resumes a stopped run. Several processes can
run it at the same time with different --only. It writes translation.md, translation.csv and translation.png into
output_dir, for all models that are finished with the given seeds. The files have the scores on the validation pairs,
translated with eval_num_beams (1: greedy search), and the curves of the training.
"""

import sys
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.errors import InputError
from moe_hf.experiments.run_curves import write_curves
from moe_hf.experiments.sweep import SweepArguments, train_runs, translation_baseline_runs, variant_runs
from moe_hf.experiments.translation_plot import plot_translation
from moe_hf.experiments.translation_report import TranslationRow, add_translation_run, translation_table
from moe_hf.extra_packages import require_packages
from moe_hf.training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from moe_hf.training.translation import train_translation
from moe_hf.writing import check_folder, whole_files


def main() -> int:
    return run_command(run)


def run() -> None:
    require_packages("matplotlib")  # fails here instead of after the training
    classes = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments, SweepArguments)
    model_args, data_args, training_args, sweep_args = parse_arguments(sys.argv[1:], classes)
    if not data_args.validation_sources():
        raise InputError("no validation pairs are given: the table is measured on them")
    check_folder(training_args.output_dir, "output_dir")
    sweep_args.check_names()
    runs = variant_runs(
        model_args, data_args, training_args, sweep_args.variants, sweep_args.seeds, train=train_translation
    )
    runs += translation_baseline_runs(data_args, training_args, sweep_args.baselines, sweep_args.seeds)
    rows = {}
    for trained in train_runs(runs, sweep_args.only):
        add_translation_run(rows, trained.name, trained.seed, trained.folder)
    if training_args.process_index == 0:
        write_report(list(rows.values()), Path(training_args.output_dir))


def write_report(rows: list[TranslationRow], folder: Path) -> None:
    table = translation_table(rows)
    print(table)
    histories = {(row.name, seed): curves for row in rows for seed, curves in zip(row.seeds, row.curves, strict=True)}
    with whole_files(folder, "output_dir") as inside:
        (inside / "translation.md").write_text(table + "\n", encoding="utf-8")
        write_curves(inside / "translation.csv", histories)
        plot_translation(rows, inside / "translation.png")


if __name__ == "__main__":
    sys.exit(main())
