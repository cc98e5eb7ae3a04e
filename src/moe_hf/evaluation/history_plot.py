"""A picture of how evenly the experts were used over a training."""

import csv
from pathlib import Path

CURVES = {
    "cv_importance": "CV(Importance)",
    "cv_load": "CV(Load)",
    "max_over_mean_load": "max/mean load",
    "dead_experts": "experts without a token",
}


def plot_expert_history(history: str | Path, file: str | Path) -> None:
    """One panel for each measure of `AuxLossCallback`'s CSV file, one curve for each MoE layer.

    Args:
        history: expert_history.csv of a training.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    layers: dict[str, list[dict]] = {}
    with open(history, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            layers.setdefault(row["layer"], []).append(row)
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for layer, rows in layers.items():
            axes.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], label=layer, marker=".")
        axes.set_title(label)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)
