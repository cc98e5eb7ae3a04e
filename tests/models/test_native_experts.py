"""The compiled kernels against float64 sums over the rows of each expert, in plain torch."""

import os
import signal
import time

import pytest
import torch

from moe_hf.models import factored_gradients, native_experts
from moe_hf.models.native_experts import Visited
from moe_hf.training import row_step

D, H = 48, 32
TIMES_FLOAT32 = dict(rtol=2e-5, atol=2e-5)

pytestmark = pytest.mark.skipif(
    native_experts.library() is None, reason="the package was installed without a compiler"
)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows():
    """90 experts with 0 to 19 rows; the kernels compute experts with at most 17 rows."""
    counts = torch.randint(0, 20, (90,), generator=torch.Generator().manual_seed(1))
    return counts, Visited(counts, 17), torch.arange(len(counts)).repeat_interleave(counts)


def taken(visited, expert_R):
    return torch.isin(expert_R, visited.experts)


def test_forward_and_backward(rows, threads):
    counts, visited, expert_R = rows
    num = int(counts.sum())
    up, down = draw(len(counts), H, D, seed=2) / D**0.5, draw(len(counts), D, H, seed=3) / H**0.5
    x, grad, weights = draw(num, D, seed=4), draw(num, D, seed=5), draw(num, seed=6)
    hidden, output = torch.full((num, H), 7.0), torch.full((num, D), 7.0)
    visited.forward(up, down, x, hidden, output)
    weighted, grad_hidden, grad_weights, grad_x = (
        grad.clone(),
        torch.zeros(num, H),
        torch.zeros(num),
        torch.zeros(num, D),
    )
    visited.backward(up, down, hidden, weights, weighted, grad_hidden, grad_weights, grad_x)

    up, down = up.double().requires_grad_()[expert_R], down.double().requires_grad_()[expert_R]
    x64, w64 = x.double().requires_grad_(), weights.double().requires_grad_()
    hidden64 = torch.einsum("rd,rhd->rh", x64, up).relu()
    hidden64.retain_grad()
    output64 = torch.einsum("rh,rdh->rd", hidden64, down)
    (w64[:, None] * output64).backward(grad.double())
    here = taken(visited, expert_R)
    assert 0 < int(here.sum()) < num
    for actual, expected in (
        (hidden, hidden64),
        (output, output64),
        (weighted, weights.double()[:, None] * grad.double()),
        (grad_hidden, hidden64.grad * (hidden64 > 0)),
        (grad_weights, w64.grad),
        (grad_x, x64.grad),
    ):
        torch.testing.assert_close(actual[here].double(), expected[here].detach(), **TIMES_FLOAT32)
    assert (output[~here] == 7).all() and (grad_x[~here] == 0).all()


def test_norm_and_step(rows, threads):
    counts, visited, expert_R = rows
    left, right = draw(int(counts.sum()), H, seed=2), draw(int(counts.sum()), D, seed=3)
    param, row, col = (
        draw(len(counts), H, D, seed=4),
        draw(len(counts), H, seed=5) ** 2,
        draw(len(counts), D, seed=6) ** 2,
    )
    decay, keep = torch.rand(2, len(visited), generator=torch.Generator().manual_seed(7))
    before = [tensor.double() for tensor in (param, row, col)]
    norm = visited.squared_norm(left, right)
    factors = dict(beta2=0.9, bias_correction=0.4, lr=0.01, eps=1e-3)
    visited.step(param, left, right, row, col, decay, keep, **factors)

    gradient = torch.zeros(len(counts), H, D, dtype=torch.float64)
    for expert, a, b in zip(expert_R.tolist(), left.double(), right.double()):
        gradient[expert] += a[:, None] * b
    gradient = gradient[visited.experts]
    assert norm == pytest.approx(gradient.square().sum().item(), rel=1e-6)
    param64, row64, col64 = (tensor[visited.experts] for tensor in before)
    row64 = decay[:, None] * row64 + 0.1 * gradient.square().mean(2)
    col64 = decay[:, None] * col64 + 0.1 * gradient.square().mean(1)
    a, b = (row64 / row64.mean(1, keepdim=True)).sqrt() + 1e-3, (col64 / 0.4).sqrt() + 1e-3
    param64 = keep[:, None, None] * param64 - 0.01 * gradient / (a[:, :, None] * b[:, None])
    for actual, expected, old in zip((param, row, col), (param64, row64, col64), before):
        torch.testing.assert_close(actual[visited.experts].double(), expected, **TIMES_FLOAT32)
        idle = ~torch.isin(torch.arange(len(counts)), visited.experts)
        assert torch.equal(actual[idle].double(), old[idle])


LIMITS = [native_experts.measured_limit, factored_gradients._measured_limit, row_step.measured_limit]


@pytest.mark.parametrize("limit_of", LIMITS, ids=["products", "norm", "step"])
def test_the_limit_is_measured_once_and_kept(limit_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limit_of.cache_clear()
    limit = limit_of(16, 32)
    (file,) = (tmp_path / "moe_hf").iterdir()
    assert limit in (0, *native_experts.ROWS_TRIED)
    file.write_text("5")
    limit_of.cache_clear()
    assert limit_of(16, 32) == 5
    limit_of.cache_clear()


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("MOE_HF_NATIVE", "0")
    native_experts.library.cache_clear()
    try:
        assert native_experts.few_rows(torch.float32, torch.device("cpu"), 16, 16) == 0
    finally:
        native_experts.library.cache_clear()


def test_a_forked_process_has_threads_of_its_own():
    """A data loader's worker is forked without its parent's threads, and would wait for those threads forever."""
    squared_norms()
    pid = os.fork()
    if not pid:
        os._exit(0 if squared_norms() == pytest.approx(40 * 9 * 256) else 1)
    end = time.monotonic() + 20
    while not (status := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    if not status[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert status == (pid, 0)


def squared_norms():
    """Of 40 experts with three rows of ones, computed in two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    left, right = torch.ones(120, 16), torch.ones(120, 16)
    result = Visited(torch.full((40,), 3), 4).squared_norm(left, right)
    torch.set_num_threads(before)
    return result
