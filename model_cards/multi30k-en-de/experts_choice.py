"""Registers this package's implementations of the experts, and chooses between them.

"moe_hf", the default, chooses by device and size: segment_experts.py on a CPU (benchmarks/results/experts.md), and
`fastest_on_gpu` on a GPU. "triton" has the kernels of triton_experts.py.
"""

import copy
import importlib.util
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .configuration_moe import MoeConfig
from .segment_experts import compute_dtype, segment_experts_forward

OWN_IMPLEMENTATION = "moe_hf"
TRITON_IMPLEMENTATION = "triton"
# The kernel of the library's grouped_mm refuses 1,024 or more groups in bfloat16.
GROUPED_MM_EXPERTS = 1023
# Up to this number of slots, a compiled step computes each slot separately, which the compiler can fuse.
COMPILED_SLOTS = 32


class Limits(NamedTuple):
    """Sizes at which one implementation becomes faster than another on a GPU.

    Attributes:
        batched_mm_rows: the largest total number of routed rows for which the library's batched_mm is the fastest.
            batched_mm copies the matrices of every row's expert, and is used only without gradients.
        grouped_mm_rows: the smallest mean number of rows per expert for which the library's grouped_mm is faster than
            this package's Triton kernels, if grouped_mm has a kernel for the GPU.
        segments_rows: the smallest mean number of rows per expert for which a loop over the experts is faster than
            this package's Triton kernels, although the loop waits for the GPU.
    """

    batched_mm_rows: int
    grouped_mm_rows: int
    segments_rows: float


# A guess that has not been measured on a GPU.
UNMEASURED = Limits(batched_mm_rows=16, grouped_mm_rows=64, segments_rows=math.inf)
# {(compute capability, dtype): limits}. Each measurement adds a line with the GPU's name and the versions.
MEASURED: dict[tuple[tuple[int, int], torch.dtype], Limits] = {}


def why_only_eager(config: MoeConfig, requested: str | None) -> str | None:
    """Return why only the "eager" implementation can compute these experts; None if the requested one can too.

    Args:
        config: has hidden_size, moe_intermediate_size, num_expert_layers, hidden_act and maybe quantization_config.
        requested: the name of an implementation; None: this package's.
    """
    if getattr(config, "quantization_config", None) is not None:
        return "computes with float weights, but the model is quantized"
    if config.num_expert_layers > 1:
        return f"computes one hidden layer, but num_expert_layers={config.num_expert_layers}"
    if requested in (None, OWN_IMPLEMENTATION, TRITON_IMPLEMENTATION) and config.hidden_act != "relu":
        return f"computes ReLU units, but hidden_act={config.hidden_act!r}"
    if requested == "grouped_mm":
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, name) % 8:
                return f"needs multiples of 8, but {name}={getattr(config, name)}"
    return None


def with_experts_implementation(config: MoeConfig) -> MoeConfig:
    """Return the configuration, or, if it has no `_experts_implementation`, a copy that has the default one.

    Models set it before they build their layers. A layer outside of a model leaves its user's configuration unchanged.
    """
    if config._experts_implementation is not None:
        return config
    config = copy.copy(config)
    config._experts_implementation = "eager" if why_only_eager(config, None) else OWN_IMPLEMENTATION
    return config


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run `MoeExperts.forward` with the fastest implementation for the device, the dtype and the sizes."""
    forward = _FORWARDS[fastest(module, hidden_states, top_k_index)]
    return forward(module, hidden_states, top_k_index, top_k_weights)


def fastest(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> str:
    """Return the implementation that `experts_forward` uses: "segments", or a name from `fastest_on_gpu`."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and top_k_index.numel() <= COMPILED_SLOTS:
        return "batched_mm"
    device, dtype = hidden_states.device, compute_dtype(hidden_states)
    is_small = dtype != torch.float64 and module.up_proj.dtype != torch.float64
    if device.type in ("cpu", "meta") or not is_small or module.factored_gradients:
        return "segments"
    is_aligned = module.hidden_dim % 8 == 0 and module.intermediate_dim % 8 == 0
    if device.type != "cuda":
        return "grouped_mm" if is_aligned else "segments"
    sizes = (top_k_index.numel(), module.num_experts, is_aligned)
    return fastest_on_gpu(dtype, *sizes, torch.is_grad_enabled(), capability(device), has_triton())


def fastest_on_gpu(
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    is_aligned: bool,
    keeps_gradients: bool,
    compute_capability: tuple[int, int],
    with_triton: bool,
) -> str:
    """Return the implementation for a GPU: "batched_mm", "grouped_mm", "triton" or "segments".

    Args:
        dtype: the dtype of the computation; autocast's dtype if autocast is on.
        num_rows: number of routed rows, T * K.
        num_experts: number of experts on this device.
        is_aligned: whether the experts' widths are multiples of 8, as grouped_mm requires.
        keeps_gradients: whether a backward pass may follow.
        compute_capability: the GPU's compute capability, or (0, 0).
        with_triton: whether triton can be imported.
    """
    limits = MEASURED.get((compute_capability, dtype), UNMEASURED)
    if num_rows <= limits.batched_mm_rows and not keeps_gradients:
        return "batched_mm"
    is_grouped = is_aligned and (dtype != torch.bfloat16 or num_experts <= GROUPED_MM_EXPERTS)
    # On other GPUs and with other dtypes, grouped_mm is a loop over the experts that waits for the GPU.
    has_kernel = dtype == torch.bfloat16 and compute_capability[0] in (9, 10)
    if is_grouped and has_kernel and num_rows >= limits.grouped_mm_rows * num_experts:
        return "grouped_mm"
    # Triton does not support products of 16 bits on GPUs before Ampere.
    if with_triton and compute_capability >= ((7, 5) if dtype == torch.float32 else (8, 0)):
        return "triton" if num_rows < limits.segments_rows * num_experts else "segments"
    return "grouped_mm" if is_grouped else "segments"


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; (0, 0) for the device of a fake tensor without a GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@torch.compiler.assume_constant_result
@cache
def has_triton() -> bool:
    """Return whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def triton_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run `triton_experts_forward`, which is imported on the first call because triton is optional."""
    from .triton_experts import triton_experts_forward

    return triton_experts_forward(module, hidden_states, top_k_index, top_k_weights)


def grouped_mm_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run the library's grouped_mm with two additions: it follows autocast, and idle experts get zero gradients."""
    is_used = None
    if hidden_states.is_cuda and capability(hidden_states.device) >= (10, 0):
        is_used = used_experts(top_k_index, module.num_experts)
    dtype = compute_dtype(hidden_states)
    experts = _Experts(module, dtype, is_used)
    output = grouped_mm_experts_forward(experts, hidden_states.to(dtype), top_k_index, top_k_weights)
    return output.to(hidden_states.dtype)


def used_experts(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return (E,) bool, which experts have a slot."""
    is_used = torch.zeros(num_experts + 1, dtype=torch.bool, device=top_k_index.device)
    return is_used.scatter_(0, top_k_index.reshape(-1).clamp(max=num_experts), True)[:num_experts]


class _Experts:
    """A view of an experts module for the library's functions, with weights cast to another dtype.

    Args:
        module: the experts.
        dtype: dtype of the weights.
        is_used: (E,) bool; the gradients of all other experts are set to zero. None: gradients do not change.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, is_used: torch.Tensor | None):
        self.module = module
        self.up_proj, self.down_proj = module.up_proj.to(dtype), module.down_proj.to(dtype)
        if is_used is not None:
            self.up_proj = _WithoutIdleGradients.apply(self.up_proj, is_used)
            self.down_proj = _WithoutIdleGradients.apply(self.down_proj, is_used)

    def __getattr__(self, name):
        return getattr(self.module, name)


class _WithoutIdleGradients(torch.autograd.Function):
    """Returns the weights unchanged; the backward pass sets the gradients of idle experts to zero.

    On Blackwell, grouped_mm leaves uninitialised memory there (github.com/pytorch/pytorch/issues/172439).
    """

    @staticmethod
    def forward(ctx, weight, is_used):
        ctx.save_for_backward(is_used)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (is_used,) = ctx.saved_tensors
        return grad.masked_fill(~is_used[:, None, None], 0), None


_FORWARDS = {
    "segments": segment_experts_forward,
    "triton": triton_forward,
    "grouped_mm": grouped_mm_forward,
    "batched_mm": batched_mm_experts_forward,
}
ALL_EXPERTS_FUNCTIONS.register(OWN_IMPLEMENTATION, experts_forward)
ALL_EXPERTS_FUNCTIONS.register(TRITON_IMPLEMENTATION, triton_forward)
