#!/usr/bin/env python3
"""Translate the lines of a file, or of standard input.

The same as `moe-hf translate`; --help tells the arguments.
"""

import sys

from moe_hf.commands.translate import main

if __name__ == "__main__":
    sys.exit(main())
