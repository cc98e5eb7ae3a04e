#!/usr/bin/env python3
"""Train an LSTM-MoE language model.

This is the same as `moe-hf train-lm`, for launchers that need a file. --help lists the arguments.
"""

import sys

from moe_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-lm", *sys.argv[1:]]))
