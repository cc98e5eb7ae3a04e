"""Reproduces table 6 of the paper: the effect of the two balancing losses on perplexity and balance."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..routing.history_plot import read_expert_history
from .numbers import mean_and_range
from .run_curves import Curves

# {(w_importance, w_load): the paper's test perplexity, CV(Importance), CV(Load) and max/mean load}
TABLE_6 = {
    (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
    (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
    (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
    (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
    (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
    (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}
MEASURES = {
    "perplexity": "validation perplexity per word",
    "cv_importance": "CV(Importance)",
    "cv_load": "CV(Load)",
    "max_over_mean_load": "max/mean load",
}


@dataclass
class BalanceRow:
    """One row of the table.

    Attributes:
        w_importance: coefficient of the importance loss.
        w_load: coefficient of the load loss.
        measures: {name in `MEASURES`: one value for each seed}.
        seeds: the seeds, in the order of the runs.
        curves: for each seed, the measures during training.
    """

    w_importance: float
    w_load: float
    measures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    seeds: list[int] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The coefficients with their names."""
        return f"w_importance={self.w_importance:g}, w_load={self.w_load:g}"

    def add(self, seed: int, metrics: dict[str, float], history: str | Path) -> None:
        """Add the results of one seed, averaged over the MoE layers.

        Args:
            seed: the run's seed.
            metrics: the result of `evaluate_lm`.
            history: the run's expert_history.csv.
        """
        self.seeds.append(seed)
        self.curves.append(read_history(history))
        self.measures["perplexity"].append(metrics["eval_perplexity_per_word"])
        for name in list(MEASURES)[1:]:
            layers = [value for key, value in metrics.items() if key.endswith("/" + name)]
            self.measures[name].append(statistics.fmean(layers))


def balance_table(rows: list[BalanceRow]) -> str:
    """Return the rows as a Markdown table of means over the seeds, with the range if there are several seeds."""
    lines = ["| w_importance | w_load | " + " | ".join(MEASURES.values()) + " | the paper's four |"]
    lines.append("|---" * (3 + len(MEASURES)) + "|")
    for row in rows:
        cells = [mean_and_range(values) for values in row.measures.values()]
        paper = TABLE_6.get((row.w_importance, row.w_load))
        cells.append(" / ".join(map(str, paper)) if paper else "-")
        lines.append(f"| {row.w_importance:g} | {row.w_load:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_balance(rows: list[BalanceRow], file: str | Path) -> None:
    """Plot the perplexity of every row, and CV(Load) and max/mean load during training.

    Args:
        rows: the rows of the table.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for position, row in enumerate(rows):
        values = row.measures["perplexity"]
        left.plot(values, [position] * len(values), "o", color=f"C{position}")
        for number, curves in enumerate(row.curves):
            label = row.label if number == 0 else None
            middle.plot(*zip(*curves["cv_load"]), color=f"C{position}", linewidth=1, label=label)
            right.plot(*zip(*curves["max_over_mean_load"]), color=f"C{position}", linewidth=1, label=label)
    left.locator_params(axis="x", nbins=5)
    left.grid(axis="y", linewidth=0.3)
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.invert_yaxis()
    left.set_xlabel(MEASURES["perplexity"])
    middle.set_yscale("symlog", linthresh=0.1)  # a CV may be 0
    right.set_yscale("log")
    for axes, name in ((middle, "cv_load"), (right, "max_over_mean_load")):
        axes.set_xlabel("step")
        axes.set_ylabel(f"{MEASURES[name]}, of training batches")
    right.legend(fontsize="x-small")
    figure.savefig(file, dpi=110)


def read_history(file: str | Path) -> Curves:
    """Read CV(Importance), CV(Load) and max/mean load from an expert_history.csv, averaged over the MoE layers."""
    by_step: dict[int, list[dict]] = {}
    for layer in read_expert_history(file).values():
        for number, step in enumerate(layer["step"]):
            by_step.setdefault(step, []).append({name: values[number] for name, values in layer.items()})
    return {
        name: [(step, statistics.fmean(line[name] for line in lines)) for step, lines in sorted(by_step.items())]
        for name in list(MEASURES)[1:]
    }
