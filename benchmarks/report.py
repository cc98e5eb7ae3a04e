"""What the benchmarks share: timing in turn, and the Markdown file, with the command, the machine and the versions."""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def heading(title: str, facts: str) -> list[str]:
    """Title, command, machine and versions, and the `facts` that all numbers share."""
    return [
        f"# {title}",
        "",
        f"`python {' '.join(sys.argv)}`",
        f"{platform.processor() or platform.machine()}, threads: {torch.get_num_threads()}, float32, {facts}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}",
        "",
    ]


def save(lines: list[str], file: Path | None) -> None:
    """Write the lines, if there is a file to write to."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def median_seconds(variants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Time all variants in turn, `rounds` times after one round that does not count: on a noisy machine only the
    ratios of such medians hold."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
