#!/usr/bin/env python3
"""Train a GNMT-MoE translation model.

This is the same as `moe-hf train-translation`, for launchers that need a file. --help lists the arguments.
"""

import sys

from moe_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-translation", *sys.argv[1:]]))
