"""Numbers of several seeds as the reports' tables show them."""

import math
import statistics


def rounded(value: float) -> str:
    """To four digits, or to a whole number."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def mean_and_range(values: list[float]) -> str:
    """The mean, from two values on with the range."""
    mean = rounded(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({rounded(min(values))} to {rounded(max(values))})"
