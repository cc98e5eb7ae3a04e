"""The compiled step of FactoredAdam against the step in plain torch, and sharded parameters."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moe_hf.models.native_experts import library
from moe_hf.training import dense_step
from moe_hf.training.optimizer import FactoredAdam

needs_kernel = pytest.mark.skipif(not hasattr(library(), "dense_step"), reason="installed without a compiler")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_after(param, gradients, **options):
    """The parameter, row and col after a step for each gradient."""
    param = torch.nn.Parameter(param)
    optimizer = FactoredAdam([param], lr=0.1, betas=(0.9, 0.9), factored=True, **options)
    for gradient in gradients:
        param.grad = gradient
        optimizer.step()
    return [param.detach(), optimizer.state[param]["row"], optimizer.state[param]["col"]]


@needs_kernel
@settings(deadline=None, max_examples=15)
@given(
    leading=st.sampled_from([(), (1,), (40,), (2, 3)]),
    rows=st.integers(1, 9),
    cols=st.sampled_from([8, 16, 40]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_the_kernel_makes_the_step_of_plain_torch(leading, rows, cols, weight_decay, threads, seed):
    """Runs in float64, which no kernel supports; the last expert does not get a token in the first step."""
    start = draw(*leading, rows, cols, seed=seed)
    gradients = [draw(*leading, rows, cols, seed=seed + t) for t in range(1, 4)]
    gradients[0].view(-1, rows, cols)[-1] = 0
    calls, call_kernel, before = [], dense_step.call_kernel, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_step, "call_kernel", lambda name, *args: calls.append(name) or call_kernel(name, *args))
        torch.set_num_threads(threads)
        try:
            actual = state_after(start.clone(), gradients, weight_decay=weight_decay, eps=1e-6)
        finally:
            torch.set_num_threads(before)
    assert calls == ["dense_step"] * 3
    in_float64 = [gradient.double() for gradient in gradients]
    expected = state_after(start.double(), in_float64, weight_decay=weight_decay, eps=1e-6)
    for got, wanted in zip(actual, expected):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6)


@needs_kernel
def test_the_kernel_takes_experts_without_tokens_and_tiny_gradients():
    start = torch.zeros(2, 2, 8)
    gradient = torch.stack([torch.zeros(2, 8), torch.full((2, 8), 1e-16)])
    param, *_ = state_after(start, [gradient], eps=1e-38)
    torch.testing.assert_close(param[0], start[0], rtol=0, atol=0)
    torch.testing.assert_close(param[1], torch.full((2, 8), -0.1), rtol=1e-4, atol=0)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_parameter_is_stepped_in_place_in_its_local_part(mesh):
    start, gradient = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    param = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    place = param.to_local().data_ptr()
    optimizer = FactoredAdam([param], lr=0.1, betas=(0.9, 0.9), factored=True)
    param.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
    expected = state_after(start.clone(), [gradient])
    assert param.to_local().data_ptr() == place
    for got, wanted in zip((param, optimizer.state[param]["row"], optimizer.state[param]["col"]), expected):
        assert torch.equal(got.full_tensor(), wanted)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_parameter_with_cut_matrices_is_refused(mesh, dim):
    param = torch.nn.Parameter(distribute_tensor(draw(3, 4, 5), mesh, [Shard(dim)]))
    param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\) must be sharded along its leading dimensions only"):
        FactoredAdam([param], factored=True).step()
