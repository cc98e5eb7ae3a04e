"""`python -m moe_hf` runs `moe-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
