"""Rows times the matrix of each row's group: both implementations against a loop in float64."""

import pytest
import torch
from device_path import device_path
from tiny_models import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

from moe_hf.models.grouped_linear import grouped_linear

GROUP_SIZES = {
    "even": [4, 4, 4],
    "idle": [0, 7, 0, 2, 0],
    "one group has all": [0, 90, 0],
    "longer than a block": [17, 1, 33, 16],
    "no rows": [0, 0],
    "some of no group": [3, 2, 0, -4],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def problem(sizes, width=5, outputs=3):
    """Rows, matrices and ends; a negative size is the number of rows of no group."""
    of_groups = [size for size in sizes if size >= 0]
    rows_RD, weight_GMD = draw(sum(map(abs, sizes)), width), draw(len(of_groups), outputs, width, seed=1)
    return rows_RD, weight_GMD, torch.tensor(of_groups).cumsum(0)


def naive(rows_RD, weight_GMD, ends_G):
    output_RM = []
    for row, row_D in enumerate(rows_RD):
        group = sum(row >= end for end in ends_G.tolist())
        is_in_one = group < len(weight_GMD)
        output_RM.append(weight_GMD[group] @ row_D if is_in_one else 0 * (weight_GMD[0] @ row_D))
    return torch.stack(output_RM) if output_RM else rows_RD @ weight_GMD[0].T


@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
@pytest.mark.parametrize("on_device", [False, True])
def test_outputs_and_gradients_are_those_of_the_loop(sizes, on_device):
    inputs = problem(sizes)
    expected = naive(*inputs)
    wanted = torch.autograd.grad(expected.sin().sum(), inputs[:2])
    if on_device:
        with device_path():
            actual = grouped_linear(*inputs)
            grads = torch.autograd.grad(actual.sin().sum(), inputs[:2])
    else:
        actual = grouped_linear(*inputs)
        grads = torch.autograd.grad(actual.sin().sum(), inputs[:2])
    assert_same(actual, expected)
    assert_same(grads, wanted)


class Operations(TorchDispatchMode):
    count = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.count += 1
        self.largest = max(self.largest, output.numel() if isinstance(output, torch.Tensor) else 0)
        return output


def operations(sizes):
    inputs = problem(sizes)
    with device_path(), Operations() as seen:
        grouped_linear(*inputs).square().sum().backward()
    return seen


def test_a_device_runs_as_many_operations_for_many_groups_as_for_few_however_uneven_they_are():
    few, many, uneven = operations([32] * 2), operations([1] * 64), operations([0] * 63 + [64])
    assert few.count == many.count == uneven.count < 60
    assert many.largest == uneven.largest  # memory does not follow the largest group


def test_it_is_one_operation_for_the_compiler():
    torch.library.opcheck(grouped_linear, problem([3, 0, 2]))
