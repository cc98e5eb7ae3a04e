"""Up to which size one of two ways to compute the same is the faster one: measured once per machine, kept in a file.

The two ways differ in their rounding. A run that is resumed must compute the same bits, so a second process reads the
file and does not measure again.
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
    """The result of `measure` on this machine, from the file of that name or else written to it.

    The files are in `$XDG_CACHE_HOME/moe_hf`, by default `~/.cache/moe_hf`; delete them to measure again.

    Args:
        name: what is chosen, and for which sizes; it becomes a part of the file's name.
        measure: called when there is no file.
        unmeasured: the result where no file can be written. Processes that measured anew would differ.
    """
    try:
        file = _folder() / f"{name}-{_machine()}.txt"
        if (kept := _read(file)) is not None:
            return kept
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent) as written:  # before the measurement, which may be for nothing
            written.write(str(measure()))
            written.flush()
            _publish(written.name, file)
        kept = _read(file)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return unmeasured
    return unmeasured if kept is None else kept


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_hf"


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
    return f"{platform.machine()}-{platform.node()}-{capability}-torch{torch.__version__}"


def _read(file: Path) -> int | None:
    """The kept choice; a file that holds none is deleted."""
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
    """The size up to which the first of two functions takes less time than the second; 0: at none.

    The functions take turns, and the fastest call of each counts, since other processes only ever add time.

    Args:
        sizes: ascending; the first at which the second function is faster ends the measurement.
        ways: the two functions for a size.
        rounds: timed calls of each function, after one that warms caches.
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
