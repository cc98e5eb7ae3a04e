"""Shared by the benchmarks: timing in turn, and the Markdown file with the command, the machine and the versions."""

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

# Keeps freed memory, as the training commands do; MOE_HF_KEEP_MEMORY=0 leaves the allocator unchanged.
ALLOCATOR = "freed memory kept" if keep_freed_memory() else "default allocator"

# Environment variables that change a measurement: the report shows them in front of the command.
VARIABLES = ("MOE_HF_KEEP_MEMORY", "OMP_NUM_THREADS")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a benchmark that also runs on an accelerator."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def placement(arguments: argparse.Namespace) -> dict:
    """Returns device and dtype, as keywords for `torch.randn` and `module.to`."""
    return {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}


def seconds_now(device: torch.device | None = None) -> float:
    """Reads the clock after the device has finished its work."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def heading(title: str, facts: str, arguments: argparse.Namespace | None = None) -> list[str]:
    """Returns title, command, machine, allocator and versions, and the `facts` that all numbers share.

    Args:
        title: the heading of the page.
        facts: text that holds for all numbers.
        arguments: the parsed arguments of `add_placement`, if the benchmark has them.
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
    """Writes the lines to `file`, unless `file` is None."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def median_seconds(variants: dict[str, Callable], rounds: int, device: torch.device | None = None) -> dict[str, float]:
    """Times all variants in turn, `rounds` times after a warm-up round, and returns the medians.

    On a noisy machine only the ratios of such medians hold.
    """
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = seconds_now(device)
            run()
            times[name].append(seconds_now(device) - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
