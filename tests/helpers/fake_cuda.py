"""Runs both families on fake CUDA tensors, which have shapes, types and a device, but no values and no GPU.

    python fake_cuda.py GUARD_LIBRARY

This is a separate program, because the library has to be loaded before torch. The program prints {case: fault or None}
as JSON. A fault is an error, or a host read that test_host_reads.py does not count.
"""

import ctypes
import importlib.util
import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0], "lib")
    for file in (folder / "libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.models import lstm

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATES = {
    "noisy": {},
    "softmax": {"gating": "softmax_top_k"},
    "hierarchical": {"num_expert_groups": 4},
    "strictly balanced": {"gating": "strictly_balanced"},
}
OTHERS = {"projected": {"lstm_hidden_size": 64}}
FAMILIES = {
    "lm": GATES | OTHERS | {"sampled": {"num_sampled": 8}, "chunked": {"loss_chunk_size": 4}},
    "gnmt": GATES
    | OTHERS
    | {name: {"attention_feeding": name} for name in ("input", "parallel")}
    | {"additive": {"attention_type": "additive"}},
}
PRECISIONS = ("float32", "autocast", "bfloat16")


def cases() -> dict[str, tuple]:
    """Returns {title: (family, changes of its configuration, precision, whether there is a mask)}."""
    found = {}
    for family, changed in FAMILIES.items():
        for name, changes in changed.items():
            found[f"{family}, {name}, autocast, padded"] = (family, changes, "autocast", True)
        for precision in PRECISIONS:
            found[f"{family}, noisy, {precision}, full"] = (family, {}, precision, False)
    return found


class Reads(TorchDispatchMode):
    """Answers the host's reads, which fake tensors cannot answer, and lists the reads from the device.

    A number reads as 0, or as 1 on the CPU. A bool reads as False ten times, then as True: generate() asks whether to
    stop.
    """

    def __init__(self):
        super().__init__()
        self.kinds, self.num_truths = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on_device = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        if func is torch.ops.aten._local_scalar_dense.default:
            self.kinds += ["value"] * is_on_device
            if args[0].dtype == torch.bool:
                self.num_truths += 1
                return self.num_truths > 10
            return 0 if is_on_device else 1
        if is_on_device and func is torch.ops.aten._to_copy.default and str(kwargs.get("device", "cuda")) == "cpu":
            self.kinds.append("copy")
        if is_on_device and func in (torch.ops.aten.nonzero.default, torch.ops.aten.bincount.default):
            self.kinds.append(func._schema.name)
        return func(*args, **kwargs)


def model_of(family: str, changes: dict):
    if family == "lm":
        return LstmMoeForCausalLM(LstmMoeConfig(**(SIZES | TOKENS | changes)))
    config = GnmtMoeConfig(**(SIZES | TOKENS | {"decoder_start_token_id": 1} | changes))
    return GnmtMoeForConditionalGeneration(config)


def to_cuda(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replaces `model.to`, which cannot exchange fake tensors."""
    moved = {weight: torch.nn.Parameter(weight.to("cuda", dtype)) for weight in model.parameters()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = moved[weight]


def run(family: str, changes: dict, precision: str, is_padded: bool) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = model_of(family, changes).train()
    model.set_experts_implementation("batched_mm")  # supports every dtype
    to_cuda(model, dtype)
    ids = torch.ones(2, 4, dtype=torch.long, device="cuda")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if is_padded else {"input_ids": ids}
    autocast = torch.autocast("cuda", torch.bfloat16) if precision == "autocast" else nullcontext()
    with Reads() as reads:
        with autocast:
            loss = model(**inputs, labels=ids).loss
        loss.backward()
        expected = ["copy"] * (is_padded + (family == "gnmt"))
        assert reads.kinds == expected, f"host reads of a training step: {reads.kinds}"
        assert loss.dtype == torch.float32 and loss.device.type == "cuda", loss
        for name, weight in model.named_parameters():
            assert weight.grad is not None, f"{name} has no gradient"
            assert (weight.grad.device, weight.grad.dtype) == (weight.device, weight.dtype), name
        model.eval()
        with autocast:
            tokens = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert tokens.device.type == "cuda", tokens


def main() -> None:
    # Replaces the functions that fail in a build without CUDA.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_bf16_supported = lambda *args: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    lstm.uses_cudnn = lambda device: True
    faults = {}
    for title, case in cases().items():
        shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        with FakeTensorMode(shape_env=shapes):
            try:
                run(*case)
                faults[title] = None
            except Exception:
                faults[title] = traceback.format_exc()
    print(json.dumps(faults))


if __name__ == "__main__":
    main()
