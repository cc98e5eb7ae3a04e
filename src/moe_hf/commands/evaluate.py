"""Judge a model on text of yours: a language model by perplexity, a translation model by BLEU, chrF and perplexity.

moe-hf evaluate LANGUAGE_MODEL FILE [FILE ...]             see also moe-hf evaluate-lm --help
moe-hf evaluate TRANSLATOR SOURCE_FILE TARGET_FILE         see also moe-hf evaluate-translation --help
"""

import sys

from transformers import AutoConfig

from ..errors import InputError, first_line, run_command
from . import evaluate_lm, evaluate_translation

COMMANDS = {"lstm_moe": evaluate_lm, "gnmt_moe": evaluate_translation}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    found = []
    status = run_command(lambda: found.append(_command(sys.argv[1])))
    return status or found[0].main()


def _command(model: str):
    """The module for the model's family."""
    try:
        model_type = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise InputError(f"model={model}: cannot be loaded ({first_line(error)})") from error
    if model_type not in COMMANDS:
        raise InputError(f"model={model} has model_type={model_type!r}, expected one of {sorted(COMMANDS)}")
    return COMMANDS[model_type]
