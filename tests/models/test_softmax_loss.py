"""Losses without logits, for a given sample: against loops in float64, and with limits on memory.

Shape suffixes: T tokens, D width, V vocabulary, N sampled classes.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from device_path import device_path
from tiny_models import assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_hf.models.softmax_loss import SoftmaxHead, chunked_cross_entropy, sampled_softmax_loss

TOKENS, WIDTH, VOCAB = 11, 4, 30
ON_DEVICE = pytest.mark.parametrize("on_device", [False, True])
SAMPLE = torch.tensor([0, 1, 4, 5, 12, 29])
LOG_COUNT = torch.tensor([0.99, 0.9, 0.5, 0.4, 0.125, 0.05], dtype=torch.float64).log()
# Classes in the sample, at its ends and outside it, one of them several times. The third token is not scored.
TARGETS = torch.tensor([0, 29, -100, 7, 7, 7, 4, 28, 1, 12, 3])


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_()


def naive_full(hidden_TD, weight_VD, targets_T):
    total = hidden_TD.new_zeros(())
    for hidden_D, target in zip(hidden_TD, targets_T.tolist()):
        if target != -100:
            total = total + torch.stack([hidden_D @ row_D for row_D in weight_VD]).exp().sum().log()
            total = total - hidden_D @ weight_VD[target]
    return total


def naive_sampled(hidden_TD, weight_VD, targets_T):
    total = hidden_TD.new_zeros(())
    for hidden_D, target in zip(hidden_TD, targets_T.tolist()):
        if target == -100:
            continue
        denominator = torch.exp(hidden_D @ weight_VD[target])
        for j, log_count in zip(SAMPLE.tolist(), LOG_COUNT.tolist()):
            if j != target:
                denominator = denominator + torch.exp(hidden_D @ weight_VD[j]) / math.exp(log_count)
        total = total + denominator.log() - hidden_D @ weight_VD[target]
    return total


def sampled(hidden_TD, weight_VD, targets_T, chunk_size=None):
    return sampled_softmax_loss(hidden_TD, weight_VD, targets_T, SAMPLE, LOG_COUNT, chunk_size)


LOSSES = {"full": (chunked_cross_entropy, naive_full), "sampled": (sampled, naive_sampled)}


@ON_DEVICE
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10, 1000])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_of_the_loops(kind, chunk_size, on_device):
    loss, naive = LOSSES[kind]
    inputs = problem()
    with device_path() if on_device else nullcontext():
        actual = loss(*inputs, TARGETS, chunk_size)
    expected = naive(*inputs, TARGETS)
    assert actual.dtype == torch.float64
    assert_same(actual, expected)
    # Not 1, as in gradient accumulation and under a loss scale.
    actual_grads, expected_grads = (torch.autograd.grad(-0.3 * value, inputs) for value in (actual, expected))
    assert_same(actual_grads, expected_grads)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_pass_gradcheck(kind, chunk_size):
    loss, _ = LOSSES[kind]
    assert torch.autograd.gradcheck(lambda *inputs: loss(*inputs, TARGETS, chunk_size), problem())


@pytest.mark.parametrize("kind", LOSSES)
def test_frozen_inputs_and_no_grad_change_nothing_else(kind):
    loss, _ = LOSSES[kind]
    hidden_TD, weight_VD = problem()
    value = loss(hidden_TD, weight_VD, TARGETS, 4)
    grads = torch.autograd.grad(value, (hidden_TD, weight_VD))
    (grad,) = torch.autograd.grad(loss(hidden_TD, weight_VD.detach(), TARGETS, 4), hidden_TD)
    assert torch.equal(grad, grads[0])
    (grad,) = torch.autograd.grad(loss(hidden_TD.detach(), weight_VD, TARGETS, 4), weight_VD)
    assert torch.equal(grad, grads[1])
    with torch.no_grad():
        alone = loss(hidden_TD, weight_VD, TARGETS, 4)
    assert not alone.requires_grad and torch.equal(alone, value.detach())


@pytest.mark.parametrize("kind", LOSSES)
def test_backward_may_be_called_twice(kind):
    inputs = problem()
    value = LOSSES[kind][0](*inputs, TARGETS, 4)
    first = torch.autograd.grad(value, inputs, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    assert_same(torch.autograd.grad(value, inputs), tuple(grad / 2 for grad in first))


@ON_DEVICE
@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_scored_is_zero_with_zero_gradients(kind, on_device):
    inputs = problem()
    with device_path() if on_device else nullcontext():
        value = LOSSES[kind][0](*inputs, torch.full((TOKENS,), -100), 4)
    assert value.item() == 0
    for grad, tensor in zip(torch.autograd.grad(value, inputs), inputs):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", LOSSES)
def test_large_logits_do_not_overflow(kind):  # in float32; the loops need float64 for these
    hidden_TD, weight_VD = problem(torch.float32)
    inputs = (50 * hidden_TD).detach().requires_grad_(), weight_VD
    assert (inputs[0] @ weight_VD.T).max() > 89
    value = LOSSES[kind][0](*inputs, TARGETS, 4)
    assert_same(value.double(), LOSSES[kind][1](*(tensor.double() for tensor in inputs), TARGETS), rtol=1e-6)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, inputs))


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "half model"])
@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_close_and_sums_in_float32(kind, is_autocast, dtype):
    loss, naive = LOSSES[kind]
    inputs = problem(torch.float32 if is_autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        value = loss(*inputs, TARGETS, 4)
    assert value.dtype == torch.float32
    exact = tuple(tensor.double().detach().requires_grad_() for tensor in inputs)
    expected = naive(*exact, TARGETS)
    assert abs(value - expected) < 0.02 * expected
    for grad, tensor, wanted in zip(torch.autograd.grad(value, inputs), inputs, torch.autograd.grad(expected, exact)):
        assert grad.dtype == tensor.dtype
        assert relative_error(grad, wanted) < 0.02


def test_autocast_computes_in_its_type():
    inputs = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = chunked_cross_entropy(*inputs, TARGETS)
    with torch.autocast("cpu", dtype=torch.float16):  # products in float32, see `_dtypes`
        wide = chunked_cross_entropy(*inputs, TARGETS)
    whole = chunked_cross_entropy(*inputs, TARGETS)
    assert half != whole and wide == whole


def test_float16_keeps_the_small_gradients_of_a_large_vocabulary():
    hidden_TD, vocabulary = torch.ones(1, 1), 100_000
    weight_VD = torch.zeros(vocabulary, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = chunked_cross_entropy(hidden_TD, weight_VD, torch.tensor([0]))
    (65536 * loss).backward()  # the scale comes after the loss
    assert_same(weight_VD.grad[1:], torch.full((vocabulary - 1, 1), 65536 / vocabulary), rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


def test_no_tensor_has_all_logits():
    tokens, width, vocab = 64, 2, 50
    hidden_TD, weight_VD = torch.randn(tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    targets_T = torch.arange(tokens) % vocab

    def largest(loss):
        with LargestTensor() as record:
            loss().backward()
        return record.elements

    assert largest(lambda: torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, targets_T)) == tokens * vocab
    assert largest(lambda: chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 8)) == 8 * vocab
    # Otherwise the inputs and the weight's gradient are the largest.
    arguments = hidden_TD, weight_VD, targets_T, SAMPLE, LOG_COUNT
    assert largest(lambda: sampled_softmax_loss(*arguments)) == tokens * (len(SAMPLE) + 1)
    assert largest(lambda: sampled_softmax_loss(*arguments, 8)) == tokens * width


def test_the_weights_gradient_is_zero_outside_of_sample_and_targets():
    hidden_TD, weight_VD = problem()
    (grad,) = torch.autograd.grad(sampled(hidden_TD, weight_VD, TARGETS), weight_VD)
    touched = set(grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched == set(SAMPLE.tolist()) | set(TARGETS.tolist()) - {-100}


def test_head_gives_logits_or_the_summed_loss():
    torch.manual_seed(0)
    head, hidden = SoftmaxHead(WIDTH, VOCAB, dtype=torch.float64), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 2], [3, 4, 29]])
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    logits = head(hidden)
    assert torch.equal(logits, hidden @ head.weight.T)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_same(head(hidden, targets, chunk_size=2), expected)
    assert_same(head(hidden, targets), expected)
