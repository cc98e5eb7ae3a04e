#!/usr/bin/env python3
"""Leave out or merge the experts that a text uses least.

The same as `moe-hf prune`; --help tells the arguments.
"""

import sys

from moe_hf.commands.prune import main

if __name__ == "__main__":
    sys.exit(main())
