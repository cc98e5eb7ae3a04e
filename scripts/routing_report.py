#!/usr/bin/env python3
"""Write a page that shows which experts a text uses and what for.

The same as `moe-hf report`; --help tells the arguments.
"""

import sys

from moe_hf.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
