"""Train a GNMT-MoE translation model.

    moe-hf train-translation CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

import sys

from ..data.arguments import TranslationDataArguments
from ..freed_memory import keep_freed_memory
from ..training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from ..training.translation import train_translation
from . import run_command

CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def train() -> dict:
        arguments = parse_arguments(argv, CLASSES, prog="moe-hf train-translation")
        if arguments[-1].device.type == "cpu":
            keep_freed_memory()
        trainer, metrics = train_translation(*arguments)
        return metrics if trainer.is_world_process_zero() else {}

    return run_command(train)
