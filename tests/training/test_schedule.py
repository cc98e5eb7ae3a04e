"""Warm-up, plateau, and 1/sqrt(step)."""

import pytest
import torch
from transformers import get_inverse_sqrt_schedule

from moe_hf.training.schedule import factor, warmup_constant_inverse_sqrt


def rates(schedule, steps):
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return values


def optimizer(rate=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_the_three_parts_by_hand():
    assert rates(warmup_constant_inverse_sqrt(optimizer(), 2, 3), 22) == pytest.approx(
        [0.0, 0.25, 0.5, 0.5, 0.5, 0.5, *(0.5 * (5 / step) ** 0.5 for step in range(6, 22))]
    )
    assert factor(20, 2, 3) == pytest.approx(0.5)


def test_without_a_plateau_it_is_the_librarys_schedule():
    ours = rates(warmup_constant_inverse_sqrt(optimizer(), 5), 30)
    assert ours == pytest.approx(rates(get_inverse_sqrt_schedule(optimizer(), num_warmup_steps=5), 30))


@pytest.mark.parametrize("steps", [(-1, 3), (3, -1), (0, 0)])
def test_steps_out_of_range_are_named(steps):
    with pytest.raises(ValueError, match=f"warmup_steps={steps[0]} and constant_steps={steps[1]}"):
        warmup_constant_inverse_sqrt(optimizer(), *steps)


def test_a_plateau_without_warm_up_starts_at_the_peak():
    assert rates(warmup_constant_inverse_sqrt(optimizer(), 0, 4), 6)[:5] == [0.5] * 5
