#!/usr/bin/env python3
"""Train language models on random facts, and count the bits that they store.

    python scripts/stored_facts.py configs/reproduction/stored-facts.yaml [--seeds 1 2] [--only NAME ...]

The facts are written to facts.txt in output_dir. Each epoch reads every fact once, in a new order. The `variants` of
the configuration are the models. The same command can be repeated: it skips finished runs and resumes a stopped run.
It writes stored-facts.md into output_dir.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.data.arguments import DataArguments
from moe_hf.experiments.stored_facts import (
    TOKENS_PER_FACT,
    FactsArguments,
    StoredFacts,
    all_bits,
    facts_text,
    stored_bits,
    stored_facts_table,
)
from moe_hf.experiments.sweep import Run, SweepArguments, train_runs, variant_runs, with_shared_tokenizer
from moe_hf.loading import load_model_and_tokenizer
from moe_hf.model_size import size_of_any
from moe_hf.training.arguments import LmModelArguments, MoeTrainingArguments, parse_arguments
from moe_hf.writing import check_folder, whole_files


def main() -> int:
    return run_command(run)


def run() -> None:
    classes = (LmModelArguments, DataArguments, MoeTrainingArguments, SweepArguments, FactsArguments)
    model_args, data_args, training_args, sweep_args, facts_args = parse_arguments(sys.argv[1:], classes)
    check_folder(training_args.output_dir, "output_dir")
    sweep_args.check_names()
    folder = Path(training_args.output_dir)
    facts = folder / "facts.txt"
    with whole_files(folder, "output_dir") as inside:
        text = facts_text(facts_args.num_symbols, facts_args.facts_seed)
        (inside / facts.name).write_text(text, encoding="utf-8")
    # A divisor of the number of facts, so that windows start at a fact in the evaluation too.
    training_args.per_device_eval_batch_size = facts_args.num_symbols * math.gcd(facts_args.num_symbols, 16)
    data_args = replace(
        data_args,
        train_files=[str(facts)],
        validation_files=[str(facts)],
        tokenizer_kind="word",
        vocab_size=facts_args.num_symbols + 2,  # <eos> and <unk>
        window_length=TOKENS_PER_FACT,
        carry_state=False,
    )
    data_args = with_shared_tokenizer(data_args, training_args)
    runs = variant_runs(model_args, data_args, training_args, sweep_args.variants, sweep_args.seeds)
    rows = [stored_by(trained, facts, facts_args) for trained in train_runs(runs, sweep_args.only)]
    if training_args.process_index == 0 and rows:
        table = stored_facts_table(rows)
        print(table)
        with whole_files(folder, "output_dir") as inside:
            (inside / "stored-facts.md").write_text(table + "\n", encoding="utf-8")


def stored_by(trained: Run, facts: Path, facts_args: FactsArguments) -> StoredFacts:
    model, tokenizer = load_model_and_tokenizer(str(trained.folder))
    bits = stored_bits(model, tokenizer, facts)
    _, ops = size_of_any(model.config)
    total = all_bits(facts_args.num_symbols**2)
    return StoredFacts(trained.name, trained.seed, model.num_parameters(), ops, bits, total)


if __name__ == "__main__":
    sys.exit(main())
