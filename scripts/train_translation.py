#!/usr/bin/env python3
"""Train a GNMT-MoE translation model.

    python scripts/train_translation.py CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

import sys

from moe_hf.errors import run_command
from moe_hf.training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from moe_hf.training.translation import train_translation
from moe_hf.training.translation_arguments import TranslationDataArguments

CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def main() -> int:
    return run_command(lambda: train_translation(*parse_arguments(dataclasses_=CLASSES))[1])


if __name__ == "__main__":
    sys.exit(main())
