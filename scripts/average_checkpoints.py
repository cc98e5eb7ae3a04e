#!/usr/bin/env python3
"""Average the weights of the last checkpoints of a training run into one model.

The same as `moe-hf average`; --help tells the arguments.
"""

import sys

from moe_hf.commands.average import main

if __name__ == "__main__":
    sys.exit(main())
