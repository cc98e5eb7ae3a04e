"""Train an LSTM-MoE language model.

    moe-hf train-lm CONFIG.yaml [--name value ...] [--resume_from_checkpoint]
    moe-hf train-lm --train_files 'text/*.txt' --validation_files valid.txt --output_dir runs/mine

`--help` lists the arguments that are used most, `--help-all` lists all of them.
"""

import sys

from ..freed_memory import keep_freed_memory
from ..training.arguments import parse_arguments
from ..training.lm import train_lm
from . import run_command


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def train() -> dict:
        arguments = parse_arguments(argv, prog="moe-hf train-lm", description=__doc__)
        if arguments[-1].device.type == "cpu":
            keep_freed_memory()
        trainer, metrics = train_lm(*arguments)
        return metrics if trainer.is_world_process_zero() else {}

    return run_command(train)
