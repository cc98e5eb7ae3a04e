"""Measuring on a device for benchmarks/gpu.py: times by the device's clock, peak memory, kernels, host reads."""

import collections
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

SECONDS_A_CASE = 0.7  # after which no further round begins


class Case(NamedTuple):
    """A measurement: its name, and the function that measures and returns {column: value}."""

    name: str
    run: Callable[[], dict]


@dataclass(frozen=True)
class Place:
    """The device, and whether sizes are tiny.

    Args:
        device: the device to measure; "cpu" tries the script.
        is_tiny: whether sizes are so small that a CPU needs only seconds for all sections.
        scattermoe: a folder with a copy of scattermoe, or None.
    """

    device: torch.device
    is_tiny: bool = False
    scattermoe: Path | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether the device has kernels, streams and events to observe."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The name of the device."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    def size(self, full, tiny):
        """Returns `tiny` if sizes are tiny, else `full`."""
        return tiny if self.is_tiny else full

    def autocast(self, dtype: torch.dtype | None):
        """Returns autocast to a dtype, or a context without effect for None.

        A CPU never autocasts: not every CPU has LSTMs in 16 bits.
        """
        is_enabled = dtype is not None and self.is_cuda
        return torch.autocast(self.device.type, dtype if is_enabled else torch.bfloat16, enabled=is_enabled)

    def synchronize(self) -> None:
        """Waits until the device has finished its work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, run: Callable, rounds: int = 20) -> float:
        """Returns the median time of a call, after warm-up calls that do not count."""
        for _ in range(1 if self.is_tiny else 3):
            run()
        self.synchronize()
        times, start = [], time.monotonic()
        for _ in range(1 if self.is_tiny else rounds):
            times.append(self._event_time(run) if self.is_cuda else self._wall_time(run))
            if len(times) >= 3 and time.monotonic() - start > SECONDS_A_CASE:
                break
        return statistics.median(times)

    @staticmethod
    def _event_time(run: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    @staticmethod
    def _wall_time(run: Callable) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def peak_gb(self, run: Callable) -> float:
        """Returns the peak memory of all tensors during a call, including tensors that existed before; 0 on a CPU."""
        if not self.is_cuda:
            run()
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def kernels(self, run: Callable) -> tuple[int, float]:
        """Returns the number of kernels that a call launches and their total milliseconds; (0, 0) on a CPU."""
        if not self.is_cuda:
            return 0, 0.0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return len(events), sum(event.device_time_total for event in events) / 1e3

    def host_reads(self, run: Callable) -> collections.Counter:
        """Counts how often the host waits for the device during a call, by the line that waits; empty on a CPU."""
        if not self.is_cuda:
            run()
            return collections.Counter()
        self.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        return collections.Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)


def release(place: Place) -> None:
    """Frees the memory that a case has left."""
    if place.is_cuda and not is_broken(place):
        gc.collect()
        torch.cuda.empty_cache()


def is_broken(place: Place) -> bool:
    """Whether a failed kernel has left the device unusable for this process."""
    try:
        place.synchronize()
    except RuntimeError:
        return True
    return False


def machine(place: Place) -> Iterator[Case]:
    """Measures the device's limits, for comparison with the other numbers."""

    def versions() -> dict:
        import transformers

        values = {"device": place.name, "torch": torch.__version__, "transformers": transformers.__version__}
        if place.is_cuda:
            properties = torch.cuda.get_device_properties(place.device)
            values |= {"capability": f"{properties.major}.{properties.minor}", "GB": properties.total_memory / 1e9}
            values |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        return values

    def product(dtype: torch.dtype, precision: str = "ieee") -> dict:
        n = place.size(8192, 64)
        matrix = torch.randn(n, n, device=place.device, dtype=dtype)
        with float32_precision(precision):
            time = place.milliseconds(lambda: matrix @ matrix, 10)
        return {"ms": time, "TFLOP/s": 2 * n**3 / time / 1e9}

    def copy() -> dict:
        source = torch.empty(place.size(2**30, 2**10), device=place.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        time = place.milliseconds(lambda: target.copy_(source))
        return {"ms": time, "TB/s": 2 * source.nbytes / time / 1e9}

    yield Case("versions", versions)
    yield Case("bfloat16 product", lambda: product(torch.bfloat16))
    yield Case("float16 product", lambda: product(torch.float16))
    yield Case("TF32 product", lambda: product(torch.float32, "tf32"))
    yield Case("float32 product", lambda: product(torch.float32))
    yield Case("copy", copy)


class float32_precision:
    """A context in which matrix products and LSTMs of float32 tensors on a GPU use "ieee" or "tf32"."""

    def __init__(self, precision: str):
        self.precision = precision
        self.backends = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cudnn.rnn

    def __enter__(self):
        self.before = [backend.fp32_precision for backend in self.backends]
        for backend in self.backends:
            backend.fp32_precision = self.precision

    def __exit__(self, *_):
        for backend, precision in zip(self.backends, self.before):
            backend.fp32_precision = precision
