"""What trainings went through, from their logs, and as one small CSV file to keep beside a table of their results."""

import csv
import json
from pathlib import Path

# {measure: [(step, value)]} of one training.
Curves = dict[str, list[tuple[int, float]]]


def read_curves(folder: str | Path, measures: dict[str, str]) -> Curves:
    """The curves of a finished training.

    Args:
        folder: where it left trainer_state.json and eval_results.json.
        measures: {name of the curve: name in the Trainer's log}.

    Returns:
        {name: [(step, value), ...]}. A measure that was evaluated only at the end has one point; one that was never
        logged has none.
    """
    state, end = (
        json.loads((Path(folder) / file).read_text(encoding="utf-8"))
        for file in ("trainer_state.json", "eval_results.json")
    )
    curves = {}
    for measure, name in measures.items():
        points = {log["step"]: log[name] for log in state["log_history"] if name in log}
        if not points and name in end:
            points[state["global_step"]] = end[name]
        curves[measure] = sorted(points.items())
    return curves


def write_curves(file: str | Path, runs: dict[tuple[str, int], Curves]) -> None:
    """One line for each step at which something was measured: model, seed, step, and the measures, empty if missing.

    Args:
        file: CSV to write.
        runs: {(model, seed): curves}, all of the same measures.
    """
    measures = list(next(iter(runs.values()), {}))
    with open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["model", "seed", "step", *measures])
        for (model, seed), curves in runs.items():
            values = {measure: dict(points) for measure, points in curves.items()}
            for step in sorted(set().union(*values.values())):
                cells = [f"{values[measure][step]:.3f}" if step in values[measure] else "" for measure in measures]
                writer.writerow([model, seed, step, *cells])
