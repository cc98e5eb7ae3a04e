#!/usr/bin/env python3
"""Make a model with many experts from a trained one with one or a few.

The same as `moe-hf upcycle`; --help tells the arguments.
"""

import sys

from moe_hf.commands.upcycle import main

if __name__ == "__main__":
    sys.exit(main())
