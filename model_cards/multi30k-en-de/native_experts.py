"""Calls the compiled kernels of native/experts.c, for experts with few rows each on a CPU.

The kernels are optional. A package that was installed without a compiler does not have them, and neither does a
model's code on the Hub. Plain torch then computes the same result. `MOE_HF_NATIVE=0` turns the kernels off.

Shape suffixes: T tokens, D width, E experts, H expert hidden size, R rows, V visited experts with few rows.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from .measured_choice import kept_choice, largest_faster

KERNELS = Path(__file__).parent.parent / "native"
ROWS_TRIED = (4, 8, 16, 32, 64)
ROWS_UNMEASURED = 8


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None."""
    if os.environ.get("MOE_HF_NATIVE") == "0":
        return None
    for path in sorted(KERNELS.glob("_experts*.so")):
        try:
            loaded = ctypes.CDLL(str(path))
            loaded.rows_squared_norm.restype = ctypes.c_double
            return loaded
        except (OSError, AttributeError):  # compiled for another system or version
            continue
    return None


def has_kernels(dtype: torch.dtype, device: torch.device, hidden_dim: int, intermediate_dim: int) -> bool:
    """Whether there are kernels for experts of this dtype and size."""
    fits = dtype == torch.float32 and device.type == "cpu" and hidden_dim % 16 == 0 and intermediate_dim % 16 == 0
    return fits and library() is not None


def few_rows(dtype: torch.dtype, device: torch.device, hidden_dim: int, intermediate_dim: int) -> int:
    """The number of rows up to which an expert's kernels are faster than matrix products; 0 where there are none."""
    is_possible = has_kernels(dtype, device, hidden_dim, intermediate_dim)
    return measured_limit(*sorted((hidden_dim, intermediate_dim))) if is_possible else 0


@cache
def measured_limit(hidden_dim: int, intermediate_dim: int) -> int:
    """Return the limit of `few_rows` on this machine, which is measured once and saved in a file."""
    name = f"few_rows-{hidden_dim}-{intermediate_dim}"
    return kept_choice(name, lambda: _measure_limit(hidden_dim, intermediate_dim), ROWS_UNMEASURED)


def num_measured(hidden_dim: int, intermediate_dim: int) -> int:
    """As many experts as fill 32 MiB, 64 at most: a few would stay in a cache."""
    return min(64, max(8, 2**22 // (hidden_dim * intermediate_dim)))


def _measure_limit(hidden_dim: int, intermediate_dim: int) -> int:
    num_experts = num_measured(hidden_dim, intermediate_dim)
    # Ones, as random numbers would advance the generator of the run.
    up = torch.ones(num_experts, intermediate_dim, hidden_dim)
    down = torch.ones(num_experts, hidden_dim, intermediate_dim)

    def ways(count: int):
        x = torch.ones(num_experts * count, hidden_dim)
        visited = Visited(torch.full((num_experts,), count), count)
        hidden, output = x.new_empty(len(x), intermediate_dim), torch.empty_like(x)

        def by_products():
            for expert, rows in enumerate(x.split(count)):
                torch.mm(torch.mm(rows, up[expert].t()).relu_(), down[expert].t())

        return lambda: visited.forward(up, down, x, hidden, output), by_products

    return largest_faster(ROWS_TRIED, ways)


class Visited:
    """The experts with at least one row and at most `limit`, as the kernels read them.

    Args:
        counts: (E,) int64, the number of rows of each expert; rows are sorted by expert.
        limit: the largest number of rows of an expert.
    """

    def __init__(self, counts: torch.Tensor, limit: int):
        self.experts = ((counts > 0) & (counts <= limit)).nonzero()[:, 0]
        self.starts = (counts.cumsum(0) - counts)[self.experts]
        self.counts = counts[self.experts]
        self.limit = limit

    def __len__(self) -> int:
        return len(self.experts)

    def forward(self, up, down, rows_RD, hidden_RH, output_RD) -> None:
        """Write relu(x up') to `hidden_RH`, and the product of `hidden_RH` and down' to `output_RD`."""
        self._call("experts_forward", *_sizes(up), up, down, rows_RD, hidden_RH, output_RD)

    def backward(self, up, down, hidden_RH, weights_R, grad_RD, grad_RH, grad_weights_R, grad_rows_RD) -> None:
        """Weight `grad_RD` in place, and write `grad_RH`, `grad_weights_R` and `grad_rows_RD`."""
        tensors = (up, down, hidden_RH, weights_R, grad_RD, grad_RH, grad_weights_R, grad_rows_RD)
        self._call("experts_backward", *_sizes(up), *tensors)

    def squared_norm(self, left_RM, right_RN) -> float:
        """Return the sum of |left' right|^2 over these experts."""
        return sum(self._call("rows_squared_norm", self.limit, left_RM.shape[1], right_RN.shape[1], left_RM, right_RN))

    def step(self, param, left, right, row, col, decay_V, keep_V, *, beta2, bias_correction, lr, eps) -> None:
        """Make the step of `row_step.step_rows` for these experts, in place."""
        tensors = (param, left, right, row, col, decay_V, keep_V)
        self._call("rows_step", self.limit, *param.shape[1:], *tensors, beta2, bias_correction, lr, eps)

    def _call(self, name: str, *arguments) -> list:
        """Call a kernel for all of these experts."""
        return call_kernel(name, len(self), self.experts, self.starts, self.counts, *arguments)


def call_kernel(name: str, number: int, *arguments) -> list:
    """Call a kernel for `number` experts, with torch's number of threads.

    Args:
        name: name of a function of `library()`.
        number: number of experts. The function's first two arguments are the range of experts of a thread.
        *arguments (Any): the other arguments: contiguous tensors, and numbers.

    Returns:
        The results of the function in all threads.
    """
    function, converted = getattr(library(), name), [_as_c(value) for value in arguments]
    num_parts = max(1, min(torch.get_num_threads(), number // 16))
    limits = [number * part // num_parts for part in range(num_parts + 1)]
    parts = [(ctypes.c_int64(first), ctypes.c_int64(last)) for first, last in zip(limits, limits[1:])]
    if num_parts == 1:
        return [function(*parts[0], *converted)]
    return list(_threads(num_parts, os.getpid()).map(lambda part: function(*part, *converted), parts))


@cache
def _threads(number: int, pid: int) -> ThreadPoolExecutor:
    """Threads that wait for work: starting them takes longer than small kernels. A forked process has none of them."""
    return ThreadPoolExecutor(number, thread_name_prefix="moe_hf")


def _sizes(up: torch.Tensor) -> tuple[int, int]:
    """Return D and H."""
    return up.shape[2], up.shape[1]


def _as_c(value):
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)
