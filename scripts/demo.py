#!/usr/bin/env python3
"""Translate a few sentences with the trained model of model_cards/. Then train a small language model and a small
translator on corpora written for the purpose, and show what they learnt; no download, a few minutes each.

    python scripts/demo.py [FOLDER]

The trained models are kept in FOLDER (default: runs/demo-N, the first N that is free).
"""

import itertools
import os
import sys
import time
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.demo.language_model import run_demo
from moe_hf.demo.shipped import run_shipped_demo
from moe_hf.demo.translator import run_translation_demo

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, SHIPPED = ROOT / "configs", ROOT / "model_cards" / "tatoeba-en-de-fr"


def main() -> int:
    free = (Path("runs") / f"demo-{n}" for n in itertools.count(1))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else next(path for path in free if not path.exists())

    def demos() -> None:
        import torch  # after moe_hf, which handles Ctrl-C while libraries are imported

        run_shipped_demo(os.path.relpath(SHIPPED))
        for demo, config, name, num_threads in (
            (run_demo, "demo.yaml", "language-model", torch.get_num_threads()),
            # Its matrices are so small that a second thread costs more in waiting than it does.
            (run_translation_demo, "demo-translation.yaml", "translation", 1),
        ):
            start = time.time()
            torch.set_num_threads(num_threads)
            demo(str(CONFIGS / config), str(folder / name))
            print(f"\nDone in {time.time() - start:.0f} s. The model is in {folder / name / 'model'}.")

    return run_command(demos)


if __name__ == "__main__":
    sys.exit(main())
