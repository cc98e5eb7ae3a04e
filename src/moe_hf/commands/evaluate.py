"""Evaluate a model on your text: a language model by perplexity, a translation model by BLEU, chrF and perplexity.

moe-hf evaluate LANGUAGE_MODEL FILE [FILE ...]             see also moe-hf evaluate-lm --help
moe-hf evaluate TRANSLATOR SOURCE_FILE TARGET_FILE         see also moe-hf evaluate-translation --help
"""

import sys

from ..families import LANGUAGE_MODELS
from ..loading import family_of
from . import evaluate_lm, evaluate_translation, run_command


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    found = []
    status = run_command(lambda: found.append(_command(argv[0])))
    return status or found[0].main(argv)


def _command(model: str):
    """Return the command module for the model's family."""
    return evaluate_lm if family_of(model) is LANGUAGE_MODELS else evaluate_translation
