#!/usr/bin/env python3
"""Train an LSTM-MoE language model.

    python scripts/train_lm.py CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

import sys

from moe_hf.errors import InputError
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm
from moe_hf.training.moe_trainer import NonFiniteLossError


def main() -> int:
    try:
        _, metrics = train_lm(*parse_arguments())
    except (InputError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in metrics.items():
        print(f"{name} = {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
