"""The paper's learning rate schedule: linear warm-up, then constant, then proportional to 1/sqrt(step)."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_constant_inverse_sqrt(optimizer: Optimizer, warmup_steps: int, constant_steps: int = 0) -> LambdaLR:
    """Return a schedule with a linear warm-up, a constant phase at the peak, and a continuous decay.

    The paper has warmup_steps=2000 and constant_steps=8000 for translation (appendix E), and warmup_steps=1000 and
    constant_steps=0 for language models (appendix C).

    Args:
        optimizer: the optimizer; its learning rate is the peak.
        warmup_steps: steps of linear increase from zero.
        constant_steps: steps at the peak. After them, the rate is peak * sqrt((warmup_steps + constant_steps) / step).

    Raises:
        ValueError: a number of steps is negative, or both are zero, which leaves the decay undefined.
    """
    if warmup_steps < 0 or constant_steps < 0 or warmup_steps + constant_steps == 0:
        raise ValueError(
            f"warmup_steps={warmup_steps} and constant_steps={constant_steps} must not be negative, and not both zero"
        )
    return LambdaLR(optimizer, lambda step: factor(step, warmup_steps, constant_steps))


def factor(step: int, warmup_steps: int, constant_steps: int) -> float:
    """Return the share of the peak learning rate at a step.

    Args:
        step: counted from 0.
        warmup_steps: as for `warmup_constant_inverse_sqrt`.
        constant_steps: as for `warmup_constant_inverse_sqrt`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    plateau_end = warmup_steps + constant_steps
    return min(1.0, (plateau_end / step) ** 0.5) if step else 1.0
