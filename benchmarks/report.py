"""The Markdown file of a benchmark: which command, on what, with which versions."""

import platform
import sys
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
