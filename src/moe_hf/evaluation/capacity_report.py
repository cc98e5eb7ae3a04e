"""Figure 2 and table 7 of the paper for runs of ours: perplexity against capacity at equal computation per token."""

import csv
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from .model_size import count_parameters, ops_per_timestep

HISTORY_COLUMNS = ("model", "seed", "step", "perplexity_per_word")


@dataclass
class CapacityRow:
    """One model: `parameters` and `ops` without embedding and softmax; of each seed the last `perplexities` (per word,
    on the validation text), `seconds` of a step, and `curves` [(step, perplexity)]."""

    name: str
    parameters: int
    ops: int
    seeds: list[int] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curves: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return statistics.fmean(self.perplexities)


def add_run(rows: dict[str, CapacityRow], name: str, seed: int, folder: str | Path) -> None:
    """Put what a finished training left in `folder` into the row of its model."""
    config = AutoConfig.from_pretrained(folder)
    row = rows.setdefault(name, CapacityRow(name, count_parameters(config), ops_per_timestep(config)))
    state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    # What a resumed run reports is its part after the last checkpoint, which does for the time of a step.
    speed = json.loads((Path(folder) / "train_results.json").read_text(encoding="utf-8"))["train_steps_per_second"]
    curve = {log["step"]: log["eval_perplexity_per_word"] for log in state["log_history"] if "eval_loss" in log}
    row.seeds.append(seed)
    row.perplexities.append(curve[max(curve)])
    row.seconds.append(1 / speed if speed else float("nan"))
    row.curves.append(sorted(curve.items()))


def capacity_table(rows: list[CapacityRow], baseline: str) -> str:
    """The rows as a Markdown table; means over the seeds and, from two seeds on, the range.

    Args:
        baseline: the model that the others' perplexity and time are compared with.
    """
    lines = [
        f"| model | parameters | operations per token | validation perplexity per word | over {baseline} | s a step |",
        "|---|---|---|---|---|---|",
    ]
    base = next(row for row in rows if row.name == baseline)
    for row in rows:
        perplexity = f"{row.perplexity:.1f}"
        if len(row.perplexities) > 1:
            perplexity += f" ({min(row.perplexities):.1f} to {max(row.perplexities):.1f})"
        change = f"{100 * (row.perplexity / base.perplexity - 1):+.1f} %"
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.2f} M | {row.ops / 1e6:.3f} M | {perplexity} | {change} | "
            f"{statistics.median(row.seconds):.2f} |"
        )
    return "\n".join(lines)


def write_history(rows: list[CapacityRow], file: str | Path) -> None:
    """The curves as CSV, small enough to keep beside the table."""
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(HISTORY_COLUMNS)
        for row in rows:
            for seed, curve in zip(row.seeds, row.curves, strict=True):
                writer.writerows((row.name, seed, step, f"{perplexity:.3f}") for step, perplexity in curve)


def plot_capacity(rows: list[CapacityRow], file: str | Path) -> None:
    """Perplexity against the number of parameters (figure 2, left), and while training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        color, marker = f"C{number % 10}", "os^D"[number // 10 % 4]
        left.plot([row.parameters] * len(row.perplexities), row.perplexities, marker, color=color)
        left.annotate(
            row.name, (row.parameters, row.perplexity), xytext=(5, 4), textcoords="offset points", fontsize="small"
        )
        for seed_number, curve in enumerate(row.curves):
            label = row.name if seed_number == 0 else None
            right.plot(*zip(*curve), color=color, linewidth=1, label=label)
    left.set_xscale("log")
    left.margins(x=0.25)
    left.set_xlabel("parameters without embedding and softmax")
    right.set_xlabel("step")
    right.set_yscale("log")
    right.legend(fontsize="x-small")
    for axes in (left, right):
        axes.set_ylabel("validation perplexity per word")
    figure.savefig(file, dpi=110)
