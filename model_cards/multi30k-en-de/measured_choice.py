"""Measures, once per machine, up to which size one of two equivalent computations is faster, and saves the result.

The two computations round differently. A resumed run must compute the same bits, so later processes read the saved
result instead of measuring again.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch


def kept_choice(name: str, measure: Callable[[], int], unmeasured: int) -> int:
    """Return the result of `measure` on this machine, from a file; measure and write the file if it does not exist.

    The files are in `$XDG_CACHE_HOME/moe_hf`, by default `~/.cache/moe_hf`; delete them to measure again.

    Args:
        name: the choice and its sizes; part of the file's name.
        measure: called if the file does not exist.
        unmeasured: the result if the file cannot be written, because repeated measurements would differ.
    """
    try:
        file = _folder() / f"{name}-{_machine()}.txt"
        if (kept := _read(file)) is not None:
            return kept
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent) as written:  # fails before the measurement, not after
            written.write(str(measure()))
            written.flush()
            _publish(written.name, file)
        kept = _read(file)
    except (OSError, RuntimeError):  # RuntimeError: the home directory is unknown
        return unmeasured
    return unmeasured if kept is None else kept


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_hf"


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
    return f"{platform.machine()}-{platform.node()}-{capability}-torch{torch.__version__}"


def _read(file: Path) -> int | None:
    """Return the saved choice; delete a damaged file."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        file.unlink(missing_ok=True)
        return None


def _publish(written: str, file: Path) -> None:
    """Give a written file its name, unless another process was first."""
    with suppress(FileExistsError):
        os.link(written, file)


def largest_faster(
    sizes: Iterable[int], ways: Callable[[int], tuple[Callable[[], object], Callable[[], object]]], rounds: int = 7
) -> int:
    """Return the largest size up to which the first of two functions is faster than the second, or 0.

    The functions take turns, and the fastest call of each counts, because other processes can only add time.

    Args:
        sizes: ascending; the measurement ends at the first size at which the second function is faster.
        ways: returns the two functions for a size.
        rounds: timed calls of each function, after one call that warms the caches.
    """
    largest = 0
    for size in sizes:
        functions = ways(size)
        fastest = [float("inf")] * 2
        for timed in [False] + [True] * rounds:
            for index, function in enumerate(functions):
                start = time.perf_counter()
                function()
                if timed:
                    fastest[index] = min(fastest[index], time.perf_counter() - start)
        if fastest[0] >= fastest[1]:
            break
        largest = size
    return largest
