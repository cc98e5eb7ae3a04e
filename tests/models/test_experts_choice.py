"""Which implementation computes the experts, and the arguments of the library's grouped_mm."""

import pytest
import torch
from tiny_models import assert_same, gradients, randomize, tiny_lm_config
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_hf.models import experts_choice
from moe_hf.models.experts import MoeExperts
from moe_hf.models.experts_choice import Limits, fastest, fastest_on_gpu, grouped_mm_forward, used_experts

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
# dtype, rows, experts, multiples of 8, gradients, capability, with triton
CHOICES = {
    (BF16, 65536, 256, True, True, HOPPER, True): "grouped_mm",
    (BF16, 65536, 1023, True, True, HOPPER, True): "grouped_mm",
    (BF16, 655360, 1024, True, True, HOPPER, True): "triton",  # grouped_mm would raise
    (BF16, 655360, 1024, True, True, HOPPER, False): "segments",
    (BF16, 1024, 256, True, True, HOPPER, True): "triton",  # 4 rows an expert
    (BF16, 65536, 256, False, True, HOPPER, True): "triton",
    (BF16, 65536, 256, False, True, HOPPER, False): "segments",
    (BF16, 65536, 256, True, True, AMPERE, True): "triton",  # grouped_mm would be a loop
    (BF16, 65536, 256, True, True, AMPERE, False): "grouped_mm",
    (BF16, 65536, 256, True, True, TURING, True): "grouped_mm",
    (FP16, 65536, 256, True, True, TURING, True): "grouped_mm",  # Triton does not support 16-bit products on this GPU
    (FP32, 65536, 256, True, True, TURING, True): "triton",
    (FP32, 65536, 256, True, True, HOPPER, True): "triton",
    (FP32, 65536, 4096, True, True, HOPPER, False): "grouped_mm",
    (FP32, 4, 256, True, False, HOPPER, True): "batched_mm",
    (FP32, 4, 256, True, True, HOPPER, True): "triton",
    (FP32, 64, 256, True, True, (0, 0), True): "grouped_mm",  # a fake tensor
}


@pytest.mark.parametrize(("sizes", "expected"), CHOICES.items())
def test_what_a_gpu_computes_with(sizes, expected):
    assert fastest_on_gpu(*sizes) == expected


def test_a_measurement_changes_the_choice(monkeypatch):
    sizes = (BF16, 64 * 256, 256, True, False, HOPPER, True)
    assert fastest_on_gpu(*sizes) == "grouped_mm"
    for limits, expected in (
        (Limits(batched_mm_rows=0, grouped_mm_rows=65, segments_rows=65), "triton"),
        (Limits(batched_mm_rows=0, grouped_mm_rows=65, segments_rows=64), "segments"),
        (Limits(batched_mm_rows=64 * 256, grouped_mm_rows=65, segments_rows=64), "batched_mm"),
    ):
        monkeypatch.setitem(experts_choice.MEASURED, (HOPPER, BF16), limits)
        assert fastest_on_gpu(*sizes) == expected


def experts(**changes):
    return randomize(MoeExperts(tiny_lm_config(**changes)))


def routing(tokens=9, k=2, num_experts=5):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=generator).requires_grad_()
    index = torch.rand(tokens, num_experts, generator=generator).topk(k).indices
    return hidden, index, torch.rand(tokens, k, generator=generator).requires_grad_()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cpu_computes_segments(device):
    hidden, index, weights = (tensor.to(device) for tensor in routing())
    module = experts().to(device)
    assert fastest(module, hidden, index) == "segments"
    assert experts_choice.experts_forward(module, hidden, index, weights).shape == (9, 8)


def test_a_gpu_is_asked_for_what_autocast_computes_in(monkeypatch):
    asked = []
    monkeypatch.setattr(experts_choice, "capability", lambda device: HOPPER)
    monkeypatch.setattr(experts_choice, "has_triton", lambda: False)
    monkeypatch.setattr(experts_choice, "fastest_on_gpu", lambda *arguments: asked.append(arguments) or "grouped_mm")
    with FakeTensorMode():
        hidden, index = torch.empty(9, 8, device="cuda"), torch.empty(9, 2, device="cuda", dtype=torch.int64)
    module = experts()
    assert fastest(module, hidden, index) == "grouped_mm"
    monkeypatch.setattr(experts_choice, "compute_dtype", lambda tensor: BF16)  # without CUDA no autocast is on
    with torch.no_grad():
        fastest(module, hidden, index)
    assert asked == [(FP32, 18, 5, True, True, HOPPER, False), (BF16, 18, 5, True, False, HOPPER, False)]
    fastest(experts(moe_intermediate_size=6), hidden, index)
    assert asked[2][3] is False
    module.factored_gradients = True
    assert fastest(module, hidden, index) == fastest(experts().double(), hidden, index) == "segments"


def test_autocast_reaches_grouped_mm(monkeypatch):
    seen, original = [], experts_choice.grouped_mm_experts_forward

    def spy(module, hidden_states, *routed):
        seen.append((hidden_states.dtype, module.up_proj.dtype, module.down_proj.dtype))
        return original(module, hidden_states, *routed)

    monkeypatch.setattr(experts_choice, "grouped_mm_experts_forward", spy)
    module, (hidden, index, weights) = experts(), routing()
    inputs = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    with torch.autocast("cpu", BF16):
        output = grouped_mm_forward(module, hidden, index, weights)
    assert seen == [(BF16, BF16, BF16)] and output.dtype == FP32
    grads = gradients(output.sum(), inputs)
    small, small_hidden = experts().to(BF16), hidden.detach().to(BF16).requires_grad_()
    expected = original(small, small_hidden, index, weights)
    small_inputs = {"hidden": small_hidden, "weights": weights, **dict(small.named_parameters())}
    assert_same(output, expected.float(), rtol=0, atol=0)
    for name, grad in gradients(expected.sum(), small_inputs).items():
        assert_same(grads[name], grad.float(), rtol=0, atol=0)
    without = grouped_mm_forward(module, hidden, index, weights)
    assert seen[1] == (FP32, FP32, FP32)
    assert_same(without, module(hidden, index, weights), rtol=1e-5, atol=1e-5)


def test_what_grouped_mm_leaves_as_the_gradient_of_idle_experts_becomes_zero():
    index = torch.tensor([[0, 3], [3, 5]])  # 5: of another rank
    is_used = used_experts(index, 5)
    assert is_used.tolist() == [True, False, False, True, False]
    weight = torch.randn(5, 2, 3, requires_grad=True)
    same = experts_choice._WithoutIdleGradients.apply(weight, is_used)
    left_in_memory = torch.full((5, 2, 3), torch.nan)
    left_in_memory[is_used] = 1.0
    (grad,) = torch.autograd.grad(same, weight, left_in_memory)
    assert torch.equal(same, weight)
    assert torch.equal(grad, is_used[:, None, None].expand(5, 2, 3).float())
