"""What the benchmarks share: timing in turn, and the Markdown file, with the command, the machine and the versions."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from moe_hf.freed_memory import keep_freed_memory

# As the training commands do; MOE_HF_KEEP_MEMORY=0 leaves the allocator as it is.
ALLOCATOR = "freed memory kept" if keep_freed_memory() else "default allocator"

# What changes a measurement, and is written before the command.
VARIABLES = ("MOE_HF_KEEP_MEMORY", "OMP_NUM_THREADS")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Arguments for a benchmark that runs on an accelerator too."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def placement(arguments: argparse.Namespace) -> dict:
    """Device and type, for `torch.randn` and `module.to`."""
    return {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}


def seconds_now(device: torch.device | None = None) -> float:
    """A clock that waits until the device has done what it was given."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def heading(title: str, facts: str, arguments: argparse.Namespace | None = None) -> list[str]:
    """Title, command, machine, allocator and versions, and the `facts` that all numbers share.

    Args:
        arguments: those of `add_placement`, if the benchmark has them.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.processor() or platform.machine()} with {capability}, threads: {torch.get_num_threads()}"
    if arguments and arguments.device.type == "cuda":
        machine = torch.cuda.get_device_name(arguments.device)
    variables = [f"{name}={os.environ[name]} " for name in VARIABLES if name in os.environ]
    return [
        f"# {title}",
        "",
        f"`{''.join(variables)}python {' '.join(sys.argv)}`",
        f"{machine}, {arguments.dtype if arguments else 'float32'}, {facts}, {ALLOCATOR}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}",
        "",
    ]


def save(lines: list[str], file: Path | None) -> None:
    """Write the lines, if there is a file to write to."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def median_seconds(variants: dict[str, Callable], rounds: int, device: torch.device | None = None) -> dict[str, float]:
    """Time all variants in turn, `rounds` times after one round that does not count: on a noisy machine only the
    ratios of such medians hold."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = seconds_now(device)
            run()
            times[name].append(seconds_now(device) - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
