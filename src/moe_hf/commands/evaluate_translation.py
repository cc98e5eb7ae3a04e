"""Perplexity, BLEU and chrF of a translation model on sentence pairs, with sacrebleu's signatures.

moe-hf evaluate-translation MODEL SOURCE_FILE TARGET_FILE [--num_beams 4] [--output translations.txt]
"""

import argparse
from pathlib import Path

from ..errors import run_command
from ..training.evaluate_translation import evaluate_translation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("source_file", help="text file, a sentence a line: plain, .gz, .xz")
    parser.add_argument("target_file", help="its translations, line by line")
    parser.add_argument("--target_language", help="of a multilingual model: the language of TARGET_FILE")
    parser.add_argument("--num_beams", type=int, default=4, help="beams; 1 is greedy search (default: 4)")
    parser.add_argument("--length_alpha", type=float, help="GNMT's length normalisation, about 0.2; needs beams")
    parser.add_argument("--coverage_beta", type=float, help="GNMT's coverage penalty, about 0.2; needs beams")
    parser.add_argument("--length_penalty", type=float, default=1.0, help="the library's own, without GNMT's score")
    parser.add_argument("--output", type=Path, help="file to write the translations to")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")

    def evaluate() -> dict:
        metrics, translations = evaluate_translation(**arguments)
        if output:
            output.write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
        return metrics

    return run_command(evaluate)
