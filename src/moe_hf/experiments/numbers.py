"""Formats numbers for the reports' tables."""

import math
import statistics


def rounded(value: float) -> str:
    """Return a number with four significant digits, or rounded to an integer if it has more digits than that."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def mean_and_range(values: list[float]) -> str:
    """Return the mean, with the range if there are several values."""
    mean = rounded(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({rounded(min(values))} to {rounded(max(values))})"
