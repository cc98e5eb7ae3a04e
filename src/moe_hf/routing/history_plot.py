"""Plots the balance of the experts over training."""

import csv
import itertools
import math
from pathlib import Path

from ..errors import InputError

# {column of expert_history.csv: label}
CURVES = {
    "cv_importance": "CV(Importance)",
    "cv_load": "CV(Load)",
    "max_over_mean_load": "max/mean load",
    "dead_experts": "experts without a token",
}

# The report's page and its other picture use other colours, such as blue for the load.
LAYER_COLORS = ("tab:brown", "tab:cyan", "tab:pink", "tab:olive", "black", "tab:gray")


def read_expert_history(history: str | Path) -> dict[str, dict[str, list[float]]]:
    """Read the curves of each MoE layer from `AuxLossCallback`'s CSV file.

    Returns:
        {layer: {"step" or name of `CURVES`: values}}.

    Raises:
        InputError: the file cannot be read, or is not an expert_history.csv.
    """
    layers: dict[str, dict[str, list[float]]] = {}
    try:
        with open(history, newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if missing := {"layer", "step", *CURVES} - set(rows.fieldnames or []):
                raise KeyError(min(missing))
            for row in rows:
                curves = layers.setdefault(row["layer"], {name: [] for name in ("step", *CURVES)})
                for name, values in curves.items():
                    values.append(int(row[name]) if name == "step" else float(row[name]))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(
            f"history={history}: not an expert_history.csv ({reason}); restore the file, or delete it to go on without"
        ) from error
    return layers


def plot_expert_history(history: str | Path, file: str | Path) -> None:
    """Plot `AuxLossCallback`'s CSV file: one panel for each measure, with one curve for each MoE layer.

    A history with a single step is shown as bars.

    Args:
        history: expert_history.csv of a run.
        file: PNG to write.
    """
    plot_curves(read_expert_history(history), file)


def plot_curves(layers: dict[str, dict[str, list[float]]], file: str | Path) -> None:
    """Plot the curves from `read_expert_history`, as `plot_expert_history` does.

    Args:
        layers: the curves.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.2), layout="constrained")
    steps = {step for curves in layers.values() for step in curves["step"]}
    logged_once = len(steps) == 1
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for color, (layer, curves) in zip(itertools.cycle(LAYER_COLORS), layers.items()):
            if logged_once:
                axes.bar(layer, curves[name], color=color)
            else:
                axes.plot(curves["step"], curves[name], label=layer, marker=".", color=color)
        axes.set_title(label)
        axes.set_xlabel(f"layer, at step {min(steps)}" if logged_once else "training step")
        if not logged_once:
            axes.locator_params(axis="x", nbins=5)
        values = [value for curves in layers.values() for value in curves[name]]
        highest = max(filter(math.isfinite, values), default=0)
        axes.set_ylim(0, 1.05 * highest if highest > 0 else None)
    if not logged_once:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)
