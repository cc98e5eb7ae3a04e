"""Reads the curves of runs from their logs, and writes them as one small CSV file."""

import csv
import json
from pathlib import Path

# {measure: [(step, value)]} of one run.
Curves = dict[str, list[tuple[int, float]]]


def read_curves(folder: str | Path, measures: dict[str, str]) -> Curves:
    """Return the curves of a finished run.

    Args:
        folder: the run's folder, with trainer_state.json and eval_results.json.
        measures: {name of the curve: name in the Trainer's log}.

    Returns:
        {name: [(step, value), ...]}. A measure that was evaluated only at the end has one point. A measure that was
        never logged has an empty list.
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
    """Write a CSV line for each step with a measurement: model, seed, step, and the measures, empty if missing.

    Args:
        file: CSV to write.
        runs: {(model, seed): curves}, all with the same measures.
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
