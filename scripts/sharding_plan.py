#!/usr/bin/env python3
"""Print how a model's experts spread over devices.

The same as `moe-hf plan`; --help tells the arguments.
"""

import sys

from moe_hf.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
