#!/usr/bin/env python3
"""Train an LSTM-MoE language model.

    python scripts/train_lm.py CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

import sys

from moe_hf.errors import run_command
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm


def main() -> int:
    return run_command(lambda: train_lm(*parse_arguments())[1])


if __name__ == "__main__":
    sys.exit(main())
