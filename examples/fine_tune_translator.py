#!/usr/bin/env python3
"""Fine-tune a translator on sentence pairs of a domain, with and without a part of the earlier training data.

    python examples/fine_tune_translator.py [--model FOLDER] [--general SOURCE TARGET VALID_SOURCE VALID_TARGET]
        [--domain SOURCE TARGET VALID_SOURCE VALID_TARGET] [--output FOLDER] [--name value ...]

Each file has one sentence per line, with its translation on the same line of the other file. Without files, the script
writes English and German phrases: phrases with a date are the domain, and other phrases are the general text. Without
--model, it first trains a model on the general text. Further arguments of `moe-hf train-translation` apply to all
trainings.

The model of the second row is fine-tuned on the domain only, and may forget the general text. The model of the third
row is fine-tuned on the domain and as many pairs of the general text.
"""

import argparse
import logging
from pathlib import Path

import moe_hf
from moe_hf.demo.number_words_en import MONTHS
from moe_hf.demo.pair_corpus import write_translation_corpus
from moe_hf.evaluation.translation_model import evaluate_translation

MODEL = dict(vocab_size=600, hidden_size=96, encoder_layer_pattern=["lstm", "moe"])
MODEL |= dict(decoder_layer_pattern=["lstm", "moe", "lstm"], attention_feeding="parallel", dropout=0.0)
MODEL |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96)
TRAINING = dict(tokens_per_batch=600, length_bucket_width=4, learning_rate=4e-3, lr_scheduler_type="cosine")
TRAINING |= dict(warmup_steps=50, logging_steps=100, save_strategy="no", report_to="none", max_steps=500)
FILES = ("SOURCE", "TARGET", "VALID_SOURCE", "VALID_TARGET")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name in ("--general", "--domain"):
        parser.add_argument(name, nargs=4, metavar=FILES)
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tuned"))
    given, others = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows the log of the trainings
    general, domain = given.general, given.domain
    if not (general and domain):
        general, domain = write_corpora(given.output / "text")

    training = TRAINING | {name.removeprefix("--"): value for name, value in zip(others[::2], others[1::2])}
    models = {"before": given.model or str(given.output / "before")}
    if not given.model:
        train([general], models["before"], **(MODEL | training))
    training |= {"model_name_or_path": models["before"], "learning_rate": 1e-3}
    for name, texts in (("domain", [domain]), ("domain and general", [domain, first_lines_of(general, domain)])):
        models[name] = str(given.output / name.replace(" ", "-"))
        train(texts, models[name], **training)

    print(f"\n{'BLEU':20} {'general':>10} {'domain':>10}")
    for name, model in models.items():
        scores = [evaluate_translation(model, *text[2:])[0]["eval_bleu"] for text in (general, domain)]
        print(f"{name:20} {scores[0]:10.1f} {scores[1]:10.1f}")


def train(texts: list, output: str, **arguments) -> None:
    sources, targets = (list(files) for files in zip(*(text[:2] for text in texts)))
    moe_hf.train_translation(train_source_files=sources, train_target_files=targets, output_dir=output, **arguments)


def first_lines_of(general: list[str], domain: list[str]) -> list[str]:
    """Write as many pairs of the general text as the domain has, into the folder of the domain's files."""
    count = len(Path(domain[0]).read_text(encoding="utf-8").splitlines())
    files = []
    for language, file in zip(("source", "target"), general):
        files.append(str(Path(domain[0]).parent / f"sample-{language}.txt"))
        lines = Path(file).read_text(encoding="utf-8").splitlines()[:count]
        Path(files[-1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def write_corpora(folder: Path) -> tuple[list[str], list[str]]:
    """Write English and German phrases of the demo: with a month as the domain, without one as the general text."""
    files = {"general": [], "domain": []}
    for part, paths in write_translation_corpus(folder).items():
        pairs = list(zip(*(paths[name].read_text(encoding="utf-8").splitlines() for name in ("en", "de"))))
        for name, is_domain in (("general", False), ("domain", True)):
            chosen = [pair for pair in pairs if any(month in pair[0] for month in MONTHS) is is_domain]
            for language, lines in zip(("en", "de"), zip(*chosen)):
                files[name].append(str(folder / f"{name}-{part}.{language}"))
                Path(files[name][-1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files["general"], files["domain"]


if __name__ == "__main__":
    main()
