"""Train an LSTM-MoE language model.

    moe-hf train-lm CONFIG.yaml [--name value ...] [--resume_from_checkpoint]

Every argument of the YAML file can be given on the command line too; `--help` lists them.
"""

from ..errors import run_command
from ..training.arguments import parse_arguments
from ..training.lm import train_lm


def main() -> int:
    return run_command(lambda: train_lm(*parse_arguments())[1])
