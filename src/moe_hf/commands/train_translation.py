"""Train a GNMT-MoE translation model.

    moe-hf train-translation CONFIG.yaml [--name value ...] [--resume_from_checkpoint]
    moe-hf train-translation --train_files pairs.tsv --source_language en --target_language de \\
        --output_dir runs/mine

`--help` lists the arguments that are used most, `--help-all` lists all of them.
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
        arguments = parse_arguments(argv, CLASSES, prog="moe-hf train-translation", description=__doc__)
        if arguments[-1].device.type == "cpu":
            keep_freed_memory()
        trainer, metrics = train_translation(*arguments)
        return metrics if trainer.is_world_process_zero() else {}

    return run_command(train)
