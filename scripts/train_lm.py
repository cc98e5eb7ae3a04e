#!/usr/bin/env python3
"""Train an LSTM-MoE language model.

The same as `moe-hf train-lm`; --help tells the arguments.
"""

import sys

from moe_hf.commands.train_lm import main

if __name__ == "__main__":
    sys.exit(main())
