#!/usr/bin/env python3
"""Train a language model on general text, fine-tune it on the text of a domain, and see what that gains and costs.

    python examples/domain_lm.py [--general TRAIN VALID] [--domain TRAIN VALID] [--output FOLDER] [--name value ...]

Each file has a sentence or paragraph a line. Without files two small corpora are written: sentences of arithmetic are
the domain, five other kinds of sentences the general text. Further arguments are those of `moe-hf train-lm`, for
both trainings, e.g. --max_steps 200.

Compare with the third row, the domain's text alone: what the general text is worth to a small domain.
"""

import argparse
from pathlib import Path

from moe_hf.demo.text_corpus import dialect_of, write_demo_corpus
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm

MODEL = "--hidden_size 96 --num_experts 8 --num_experts_per_tok 2 --moe_intermediate_size 96 --dropout 0.1"
TRAINING = "--learning_rate 4e-3 --warmup_steps 50 --max_steps 500 --logging_steps 100 --window_length 32"
TRAINING += " --per_device_train_batch_size 16 --lr_scheduler_type cosine --save_strategy no --report_to none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--general", "--domain"):
        parser.add_argument(name, nargs=2, metavar=("TRAIN", "VALID"))
    parser.add_argument("--output", type=Path, default=Path("runs/domain-lm"))
    given, others = parser.parse_known_args()
    general, domain = given.general, given.domain
    if not (general and domain):
        general, domain = write_corpora(given.output / "text")

    common = [*TRAINING.split(), *others]
    # One vocabulary for both texts: a tokenizer trained on the general text knows no word of the domain.
    new = [*MODEL.split(), "--tokenizer_kind", "bpe", "--vocab_size", "1000", *common]
    models = {name: str(given.output / name) for name in ("general", "fine-tuned", "domain alone")}
    train(general[0], models["general"], *new)
    train(domain[0], models["fine-tuned"], *common, "--model_name_or_path", models["general"])
    train(domain[0], models["domain alone"], *new)

    print(f"\n{'perplexity per word':20} {'general':>10} {'domain':>10}")
    for name, model in models.items():
        scores = [evaluate_lm(model, [text[1]])["eval_perplexity_per_word"] for text in (general, domain)]
        print(f"{name:20} {scores[0]:10.2f} {scores[1]:10.2f}")


def train(text: str, output: str, *arguments: str) -> None:
    train_lm(*parse_arguments(["--train_files", text, "--output_dir", output, *arguments]))


def write_corpora(folder: Path) -> tuple[list[str], list[str]]:
    """The demo's sentences, those of arithmetic and the others."""
    files = {"general": [], "domain": []}
    for part, whole in zip(("train", "valid"), write_demo_corpus(folder)):
        lines = Path(whole).read_text(encoding="utf-8").splitlines()
        for name, is_domain in (("general", False), ("domain", True)):
            file = folder / f"{name}-{part}.txt"
            chosen = [line for line in lines if (dialect_of(line) == "arithmetic") is is_domain]
            file.write_text("\n".join(chosen) + "\n", encoding="utf-8")
            files[name].append(str(file))
    return files["general"], files["domain"]


if __name__ == "__main__":
    main()
