#!/usr/bin/env python3
"""Size and cost of the paper's models beside those of configs/.

The same as `moe-hf table`; --help tells the arguments.
"""

import sys

from moe_hf.commands.table import main

if __name__ == "__main__":
    sys.exit(main())
