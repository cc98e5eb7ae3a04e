#!/usr/bin/env python3
"""Perplexity of a language model on text files, and how evenly they use its experts.

The same as `moe-hf evaluate-lm`; --help tells the arguments.
"""

import sys

from moe_hf.commands.evaluate_lm import main

if __name__ == "__main__":
    sys.exit(main())
