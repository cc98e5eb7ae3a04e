"""Train a GNMT-MoE translation model.

    moe-hf train-translation CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

from ..data.arguments import TranslationDataArguments
from ..errors import run_command
from ..training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from ..training.translation import train_translation

CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def main() -> int:
    return run_command(lambda: train_translation(*parse_arguments(dataclasses_=CLASSES))[1])
