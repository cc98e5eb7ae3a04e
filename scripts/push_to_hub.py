#!/usr/bin/env python3
"""Put a trained model on the Hub.

The same as `moe-hf push`; --help tells the arguments.
"""

import sys

from moe_hf.commands.push import main

if __name__ == "__main__":
    sys.exit(main())
