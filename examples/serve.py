#!/usr/bin/env python3
"""`transformers serve` and `transformers chat` for language models of this package.

    python examples/serve.py serve MODEL --port 8000      # the arguments are those of `transformers`

Transformers 5.23 looks for a served model's class among its own (`getattr(transformers, architecture)`), and not by
the Auto classes; so it is put there.
"""

from transformers.cli.serving import model_manager
from transformers.cli.transformers import main as run_transformers

from moe_hf import LstmMoeForCausalLM


def main() -> None:
    model_manager.transformers.LstmMoeForCausalLM = LstmMoeForCausalLM
    run_transformers()


if __name__ == "__main__":
    main()
