#!/usr/bin/env python3
"""Train a small LSTM-MoE on a corpus written for the purpose, and show what it learnt; no download, a few minutes.

    python scripts/demo.py [FOLDER]

Everything is kept in FOLDER (default: runs/demo-N, the first N that is free).
"""

import itertools
import sys
import time
from pathlib import Path

from moe_hf.errors import run_command
from moe_hf.training.demo import run_demo

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    free = (Path("runs") / f"demo-{n}" for n in itertools.count(1))
    folder = sys.argv[1] if len(sys.argv) > 1 else next(path for path in free if not path.exists())
    start = time.time()

    def demo() -> None:
        run_demo(str(ROOT / "configs" / "demo.yaml"), str(folder))
        print(f"\nDone in {time.time() - start:.0f} s. The model is in {folder}/model.")

    return run_command(demo)


if __name__ == "__main__":
    sys.exit(main())
