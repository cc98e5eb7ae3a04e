"""The Triton kernels against the eager experts in float64, in Triton's interpreter on a CPU (see conftest.py)."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_models import assert_same, gradients, randomize, tiny_lm, tiny_lm_config

from moe_hf import LstmMoeForCausalLM
from moe_hf.models import experts_choice
from moe_hf.models.experts import MoeExperts

pytest.importorskip("triton", reason="triton is optional; it has no packages for some systems")
from moe_hf.models import triton_experts, triton_kernels  # noqa: E402

pytestmark = pytest.mark.gpu_path
DEVICE = "cpu" if triton_kernels.IS_INTERPRETED else "cuda"
# Relative to the largest element. The interpreter truncates float32 to bfloat16; a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def pair(dtype=torch.float32, **changes):
    """Eager experts in float64, and ours in `dtype` with the same weights."""
    config = tiny_lm_config(**changes)
    expected, config_of_ours = randomize(MoeExperts(config)).to(dtype).double(), tiny_lm_config(**changes)
    config_of_ours._experts_implementation = "triton"
    ours = MoeExperts(config_of_ours).to(dtype)
    ours.load_state_dict(expected.state_dict())
    return expected, ours.to(DEVICE)


def routing(tokens, k, num_experts, width=8, seed=0, unused=()):
    """Hidden states, k different experts per token, and weights, 0 for the `unused` (token, slot) pairs."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, num_experts, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator) + 0.1
    for token, slot in unused:
        weights[token, slot] = 0
    return torch.randn(tokens, width, generator=generator), index, weights


def run(module, hidden, index, weights, dtype, weights_dtype, autocast=None):
    """The output and all gradients under a fixed probe, in float64 on the CPU."""
    device = module.up_proj.device
    hidden = hidden.to(device, dtype).requires_grad_()
    weights = weights.to(device, weights_dtype).requires_grad_()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        output = module(hidden, index.to(device), weights)
    probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output)
    grads = gradients(
        (output * probe).sum(), {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    )
    assert [grad.dtype for grad in grads.values()] == [dtype, weights_dtype, *(p.dtype for p in module.parameters())]
    return {"output": output.detach().double().cpu()} | {name: grad.double().cpu() for name, grad in grads.items()}


def assert_close(actual, expected, tolerance):
    for name, value in expected.items():
        assert_same(actual[name], value, rtol=0, atol=tolerance * max(value.abs().max().item(), 1e-30))


def check(dtype, hidden, index, weights, autocast=None, **changes):
    expected_module, ours = pair(dtype, **changes)
    expected = run(expected_module, hidden.to(dtype), index, weights, torch.float64, torch.float64)
    expected["weights"] = expected["weights"].masked_fill(weights == 0, 0)
    actual = run(ours, hidden, index, weights, dtype, torch.float32, autocast)
    assert_close(actual, expected, TOLERANCE[autocast or dtype])
    return actual


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_are_those_of_eager_experts(dtype):
    check(dtype, *routing(9, 2, 5, unused=[(0, 0), (3, 1)]))


def test_sizes_that_no_block_divides():
    hidden, index, weights = routing(20, 2, 3, width=40)
    index[:, 0], index[:, 1] = 0, index[:, 1].clamp(min=1)  # 20 rows for the first expert
    blocks = triton_experts.rows_blocks(40 / 3, torch.float32)
    assert (blocks.rows, blocks.inputs, blocks.outputs) == (16, 32, 64)
    check(torch.float32, hidden, index, weights, hidden_size=40, moe_intermediate_size=72, num_experts=3)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_kernels_and_gradients_stay_float32(autocast):
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "triton_experts" in str(func):
                seen.append({arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()})
            return func(*args, **(kwargs or {}))

    with Spy():
        check(torch.float32, *routing(9, 2, 5), autocast=autocast)
    assert len(seen) == 2 and all(dtypes == {autocast, torch.float32} for dtypes in seen)


def test_idle_experts_have_gradients_of_exactly_zero():
    hidden, index, weights = routing(6, 2, 3)
    grads = check(torch.float32, hidden, index, weights, num_experts=7)
    for name in ("up_proj", "down_proj"):
        assert grads[name][:3].abs().amax(dim=(1, 2)).min() > 0
        assert (grads[name][3:] == 0).all()


def test_padding_and_experts_of_other_ranks_are_not_computed():
    expected, ours = pair()
    hidden, index, weights = routing(6, 2, 5)
    index[2] = 5  # of another rank
    weights[2] = weights[4] = 0
    hidden[4] = torch.nan
    routed = triton_experts.sort_slots(index, weights, 5)
    assert routed.offsets[-1] == 8 and set(routed.order[:8].tolist()) == {0, 1, 2, 3, 6, 7, 10, 11}
    actual = run(ours, hidden, index, weights, torch.float32, torch.float32)
    computed = torch.tensor([0, 1, 3, 5])
    part = run(expected, hidden[computed], index[computed], weights[computed], torch.float64, torch.float64)
    for name in ("hidden", "weights", "output"):
        assert (actual[name][[2, 4]] == 0).all()
    assert_same(actual["output"][computed], part["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_any_row_all_gradients_are_zero(tokens):
    _, ours = pair()
    hidden, index, weights = routing(tokens, 2, 5)
    results = run(ours, hidden, index, torch.zeros_like(weights), torch.float32, torch.float32)
    assert results["output"].shape == (tokens, 8)
    assert all((value == 0).all() for value in results.values())


def test_nan_is_not_hidden_by_relu():
    _, ours = pair()
    hidden, index, weights = routing(4, 2, 5)
    hidden[1, 3] = torch.nan
    output = ours(hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))
    assert output.isnan().all(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("rows", [1, 16, 100, 5000])
def test_every_row_is_in_one_tile(rows):
    generator = torch.Generator().manual_seed(rows)
    counts = torch.bincount(torch.randint(0, 2000, (rows,), generator=generator), minlength=2000)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    tiles, tile_ends = triton_experts._tiles(offsets, rows, 16)
    assert tile_ends.diff(prepend=torch.zeros(1)).tolist() == (counts / 16).ceil().tolist()
    used = tiles[tiles < 2000]
    assert used.bincount(minlength=2000).tolist() == (counts / 16).ceil().tolist()
    assert (tiles[len(used) :] == 2000).all()


def test_the_same_inputs_give_the_same_bits_in_any_layout():
    _, ours = pair()
    hidden, index, weights = routing(7, 3, 5)
    first = run(ours, hidden, index, weights, torch.float32, torch.float32)
    ours.up_proj.data = ours.up_proj.data.mT.contiguous().mT
    other = run(ours, hidden.t().contiguous().t(), index, weights, torch.float32, torch.float32)
    for name, value in first.items():
        assert torch.equal(value, other[name]), name


def test_one_operation_for_the_compiler():
    _, ours = pair()
    hidden, index, weights = (tensor.to(DEVICE) for tensor in routing(6, 2, 5))
    arguments = (hidden.requires_grad_(), index, weights.requires_grad_(), ours.up_proj, ours.down_proj)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(triton_experts._experts, (*arguments, True), test_utils=checks)
    without = [tensor.detach() for tensor in arguments]
    torch.library.opcheck(triton_experts._experts, (*without, False), test_utils="test_faketensor")
    output, kept, *_ = triton_experts._experts(*without, False)
    assert kept.numel() == 0 and torch.equal(output, triton_experts._experts(*arguments, True)[0])


def test_the_whole_model_agrees():
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    model = tiny_lm(torch.float32, experts="triton").to(DEVICE)
    assert_same(model(input_ids.to(DEVICE)).logits.cpu(), tiny_lm(torch.float32)(input_ids).logits, 1e-5, 1e-5)


def test_what_the_kernels_cannot_compute_is_refused(monkeypatch):
    for changes, reason in (
        ({"num_expert_layers": 2}, "num_expert_layers=2"),
        ({"hidden_act": "tanh"}, "computes ReLU units, but hidden_act='tanh'"),
    ):
        config = tiny_lm_config(**changes)
        with pytest.raises(ValueError, match=f"experts_implementation='triton' .*{reason}; use 'eager'"):
            LstmMoeForCausalLM._from_config(config, experts_implementation="triton")
    _, ours = pair()
    with pytest.raises(
        ValueError, match="experts_implementation='triton' computes in .*not torch.float64; use 'moe_hf'"
    ):
        ours.double()(*routing(3, 2, 5))
    monkeypatch.setattr(triton_experts, "IS_INTERPRETED", False)
    with pytest.raises(RuntimeError, match="experts_implementation='triton' needs a GPU.*use 'moe_hf'"):
        ours.float().cpu()(*routing(3, 2, 5))


def test_without_triton_one_error_names_the_argument(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    experts_choice.has_triton.cache_clear()
    with pytest.raises(ValueError, match="experts_implementation='triton' needs the package triton.*use 'moe_hf'"):
        tiny_lm(experts="triton")
    for name in ("triton_experts", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"moe_hf.models.{name}")
    with pytest.raises(ImportError, match="experts_implementation='triton' needs the package triton.*use 'moe_hf'"):
        experts_choice.triton_forward(*[None] * 4)


COMPILE = """
import runpy, sys, triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernels = runpy.run_path(sys.argv[1])
FLAGS = dict(slots_per_token=2, product_dtype=tl.bfloat16, precision="ieee", block_rows=16)
ROWS = dict(gathers=True, scatters=False, epilogue="backward", block_inputs=32, block_outputs=64)
WEIGHTS = dict(gathers_left=True, block_left=64, block_right=64)
TYPES = dict(order="*i64", expert_of_tile="*i32", tile_ends="*i32", offsets="*i32", scales="*fp32", dots="*fp32")
TYPES |= {name: "*bf16" for name in ("rows", "output", "hidden", "left", "right")} | dict(weight="*fp32")
for name, flags in (("rows_kernel", ROWS), ("weights_kernel", WEIGHTS)):
    kernel = kernels[name]
    constants = {name: value for name, value in (FLAGS | flags).items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, types, indexed), target=GPUTarget("cuda", 80, 32))
    assert "mma.sync" in compiled.asm["ptx"] and compiled.metadata.shared < 64 * 1024
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """The interpreter accepts more than the compiler does."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    arguments = [sys.executable, "-c", COMPILE, triton_kernels.__file__]
    subprocess.run(arguments, check=True, env=environment, timeout=300)
