#!/usr/bin/env python3
"""Train a language model on general text, fine-tune it on domain text, and compare the perplexities on both.

    python examples/domain_lm.py [--general TRAIN VALID] [--domain TRAIN VALID] [--output FOLDER] [--name value ...]

Each file has one sentence or paragraph per line. Without files, the script writes two small corpora: sentences of
arithmetic are the domain, and five other kinds of sentences are the general text. Further arguments of
`moe-hf train-lm`, such as --max_steps 200, apply to all trainings.

The third row is a model trained on the domain text only. It shows how much the general text helps in a small domain.
"""

import argparse
import logging
from pathlib import Path

import moe_hf
from moe_hf.demo.text_corpus import dialect_of, write_demo_corpus
from moe_hf.evaluation.language_model import evaluate_lm

MODEL = dict(hidden_size=96, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, dropout=0.1)
# Subwords, because a word vocabulary of the general text does not have the words of the domain.
MODEL |= dict(tokenizer_kind="bpe", vocab_size=1000)
TRAINING = dict(learning_rate=4e-3, warmup_steps=50, max_steps=500, logging_steps=100, window_length=32)
TRAINING |= dict(per_device_train_batch_size=16, lr_scheduler_type="cosine", save_strategy="no", report_to="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--general", "--domain"):
        parser.add_argument(name, nargs=2, metavar=("TRAIN", "VALID"))
    parser.add_argument("--output", type=Path, default=Path("runs/domain-lm"))
    given, others = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows the log of the trainings
    general, domain = given.general, given.domain
    if not (general and domain):
        general, domain = write_corpora(given.output / "text")

    training = TRAINING | {name.removeprefix("--"): value for name, value in zip(others[::2], others[1::2])}
    models = {name: str(given.output / name) for name in ("general", "fine-tuned", "domain alone")}
    moe_hf.train_lm(train_files=general[0], output_dir=models["general"], **(MODEL | training))
    moe_hf.train_lm(
        train_files=domain[0], output_dir=models["fine-tuned"], model_name_or_path=models["general"], **training
    )
    moe_hf.train_lm(train_files=domain[0], output_dir=models["domain alone"], **(MODEL | training))

    print(f"\n{'perplexity per word':20} {'general':>10} {'domain':>10}")
    for name, model in models.items():
        scores = [evaluate_lm(model, [text[1]])["eval_perplexity_per_word"] for text in (general, domain)]
        print(f"{name:20} {scores[0]:10.2f} {scores[1]:10.2f}")


def write_corpora(folder: Path) -> tuple[list[str], list[str]]:
    """Write the demo's sentences, with arithmetic as the domain and other sentences as the general text."""
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
