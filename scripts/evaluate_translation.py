#!/usr/bin/env python3
"""Perplexity, BLEU and chrF of a translation model on sentence pairs.

The same as `moe-hf evaluate-translation`; --help tells the arguments.
"""

import sys

from moe_hf.commands.evaluate_translation import main

if __name__ == "__main__":
    sys.exit(main())
