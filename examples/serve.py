#!/usr/bin/env python3
"""`transformers serve` and `transformers chat` for language models of this package.

    python examples/serve.py serve MODEL --port 8000      # the arguments are those of `transformers`

Transformers 5.23 looks for a served model's class among its own (`getattr(transformers, architecture)`), and not by
the Auto classes; so it is put there.
"""

import sys

import transformers

import moe_hf


def main() -> None:
    transformers.LstmMoeForCausalLM = moe_hf.LstmMoeForCausalLM
    from transformers.cli.transformers import main as run_transformers

    run_transformers()


if __name__ == "__main__":
    sys.exit(main())
