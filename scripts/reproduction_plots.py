#!/usr/bin/env python3
"""Draw four plots of docs/reproduction/ that the experiments do not draw, from the numbers in its results folder.

    python scripts/reproduction_plots.py [--folder docs/reproduction/results]

Writes multi30k-published.png, from the CSV files of three comparisons, specialisation.png, from specialisation.md, and
capacity-experts.png and pairs-per-weight.png, from the CSV files of the capacity comparisons and the paper's tables 7
and 8.
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

from moe_hf.commands import run_command
from moe_hf.commands.table import CONFIGS, read_config
from moe_hf.experiments import paper_tables
from moe_hf.experiments.text_per_expert import pairs_per_weight, tokens_per_expert
from moe_hf.extra_packages import require_packages
from moe_hf.writing import check_folder

MULTI30K = {
    "multi30k-en-de-recipe.csv": {"dense": "dense LSTM", "MoE-32": "MoE-32"},
    "multi30k-en-de-deep-output.csv": {"MoE-32": "MoE-32, width 256, deep output"},
    "multi30k-en-de-transformer.csv": {"Transformer-Tiny": "Transformer-Tiny"},
    "multi30k-en-de-transformer-untied.csv": {"Transformer-Tiny": "Transformer-Tiny, untied (stopped)"},
}
# (title, start of the layer's name) of the layers in specialisation.md, in the order of its tables.
SPECIALISATION = [
    ("language model", "layers"),
    ("English to French, decoder", "decoder"),
    ("English to French, encoder", "encoder"),
    ("English to German, decoder", "decoder"),
    ("English to German, encoder", "encoder"),
    ("27 epochs, decoder", "decoder"),
    ("27 epochs, encoder", "encoder"),
    ("best translator, decoder", "decoder"),
    ("best translator, encoder", "encoder"),
]
GATES = ["trained", "trained model, gates drawn", "untrained model, gates drawn"]

# (label, marker, file, file with MoE-1-Wide, ending of the models' names) of the capacity comparisons.
CAPACITY = [
    ("ours, 18 million tokens", "o", "capacity.csv", "capacity.csv", ""),
    ("the same, second seed", "x", "capacity-seed2.csv", "capacity-seed2.csv", ""),
    ("the same, without balancing losses", "v", "capacity-no-balancing.csv", "capacity.csv", ""),
    ("the same, gates that start decided", "D", "capacity-pilots.csv", "capacity.csv", "-decided"),
    ("the same, decided, and fine experts", "*", "capacity-pilots.csv", "capacity.csv", "-fine-decided"),
    ("ours, 64 million tokens, decided (4,096: half-sized)", "P", "capacity-long.csv", "capacity-long.csv", ""),
    ("ours, 64 million tokens, second seed", "^", "capacity-long-seed2.csv", "capacity-long-seed2.csv", ""),
    ("ours, 64 million tokens, fine experts", "X", "capacity-long.csv", "capacity-long.csv", "-fine"),
]
# Models that differ in the number of experts; the rest of the name says how the gates start, and the experts' size.
# 4,096 experts of half the size belong to the curve of full-sized ones.
EXPERTS = re.compile(r"MoE-(\d+)(?:-h)?(?:-half)?((?:-fine)?(?:-decided)?)")


class Point(NamedTuple):
    """A model's gain, and the text that its experts saw.

    Attributes:
        experts: the number of experts.
        pairs: (token, expert) pairs per weight.
        tokens: tokens per expert and step.
        gain: how many percent the perplexity is below that of the model without more experts.
    """

    experts: int
    pairs: float
    tokens: float
    gain: float


def main() -> int:
    return run_command(run)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", default="docs/reproduction/results", help="folder of numbers and plots (default: %(default)s)"
    )
    folder = Path(parser.parse_args().folder)
    require_packages("matplotlib")
    check_folder(str(folder), "folder")
    plot_multi30k(folder)
    plot_specialisation(folder)
    plot_experts(folder)
    plot_pairs_per_weight(folder)


def plot_multi30k(folder: Path) -> None:
    """Plot validation BLEU and perplexity per word during training, for models trained with the published recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, measure, label in zip(
        figure.subplots(1, 2), ("bleu", "perplexity_per_word"), ("validation BLEU", "validation perplexity per word")
    ):
        for file, labels in MULTI30K.items():
            rows = [row for row in csv_rows(folder / file) if row[measure]]
            for model, name in labels.items():
                points = [(int(row["step"]), float(row[measure])) for row in rows if row["model"] == model]
                axes.plot(*zip(*points), linewidth=1, marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(fontsize="small")
    figure.savefig(folder / "multi30k-published.png", dpi=110)


def plot_specialisation(folder: Path) -> None:
    """Plot the strongest expert's information about the token read and the next token, for each layer and gate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    layers = specialisation_rows(folder / "specialisation.md")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("bits about the token read", "bits about the token after it")
    ):
        for number, gates in enumerate(GATES):
            places = [place + (number - 1) * 0.27 for place in range(len(layers))]
            axes.barh(places, [bits[gates][column] for bits in layers], height=0.26, label=gates)
        axes.set_yticks(range(len(layers)), [title for title, _ in SPECIALISATION])
        axes.set_xlabel(label)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside upper center", ncols=len(GATES))
    figure.savefig(folder / "specialisation.png", dpi=110)


def specialisation_rows(file: Path) -> list[dict[str, tuple[float, float]]]:
    """Return the bits in specialisation.md: for each layer {gates: (about the token read, about the next token)}."""
    layers: list[dict[str, tuple[float, float]]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) < 5 or cells[1] not in GATES:
            continue
        if cells[1] == GATES[0]:
            layers.append({})
            assert cells[0].startswith(SPECIALISATION[len(layers) - 1][1]), line
        layers[-1][cells[1]] = (float(cells[3].split()[0]), float(cells[4].split()[0]))
    return layers


def plot_experts(folder: Path) -> None:
    """Plot the gain against the number of experts, ours and the paper's: figure 2 (left) in percent.

    Of two models with as many experts, the one with the hierarchical gate is drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = {"the paper, 8.3 billion words": paper_points()["the paper, 8.3 billion words"]}
    for label, _, file, baseline_file, ending in CAPACITY:
        steps = measured_points(folder / file, folder / baseline_file, ending)
        curves[label] = steps[max(steps)]
    for (label, points), marker in zip(curves.items(), ["s", *(marker for _, marker, *_ in CAPACITY)], strict=True):
        gains = {point.experts: point.gain for point in points}  # the hierarchical gate follows the flat one
        if 32 in gains:
            gains[1] = 0.0
        axes.plot(*zip(*sorted(gains.items())), marker=marker, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [1, 4, 32, 256, 1024, 4096], [f"{experts:,}" for experts in ticks])
    axes.set_xlabel("experts")
    axes.set_ylabel("perplexity below that of MoE-1-Wide, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(folder / "capacity-experts.png", dpi=110)


def plot_pairs_per_weight(folder: Path) -> None:
    """Plot the gain by experts against the text that an expert saw, for all capacity comparisons and the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, place, name in zip(
        panels, ("pairs", "tokens"), ("(token, expert) pairs per weight of an expert", "tokens per expert and step")
    ):
        panel.axhline(0, color="0.6", linewidth=1)
        for number, (label, points) in enumerate(paper_points().items()):
            plot_points(panel, place, points, color=f"C{number}", marker="s", label=label)
        for label, marker, file, baseline_file, ending in CAPACITY:
            steps = measured_points(folder / file, folder / baseline_file, ending)
            last = max(steps)
            plot_points(panel, place, steps.pop(last), color="C3", marker=marker, label=label)
            if marker != "o":
                continue
            for step, points in steps.items():
                earlier = f"the same, after {min(steps):,} to {max(steps):,} of {last:,} steps"
                label = earlier if step == min(steps) else None
                panel.plot(*coordinates(points, place), ".-", color="C3", alpha=0.3, linewidth=1, label=label)
        panel.set_xscale("log")
        panel.margins(x=0.1)
        panel.set_xlabel(name)
    panels[0].set_ylabel("perplexity below that of MoE-1-Wide, %")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside upper center", ncols=3)
    figure.savefig(folder / "pairs-per-weight.png", dpi=110)


def plot_points(panel, place: str, points: list[Point], color: str, marker: str, label: str) -> None:
    """Plot points as a line, with the number of experts beside each; `place` is the attribute on the x axis.

    Flat and hierarchical gates over as many experts share a label. A single point and a second seed go without.
    """
    panel.plot(*coordinates(points, place), marker=marker, color=color, markersize=5, linewidth=1.2, label=label)
    has_labels = len(points) > 1 and not label.endswith("second seed")
    labelled = {point.experts: point for point in reversed(points)} if has_labels else {}
    for experts, point in labelled.items():
        is_leftmost = experts == max(labelled)
        panel.annotate(
            f"{experts:,}",
            (getattr(point, place), point.gain),
            xytext=(-6, -3) if is_leftmost else (0, 6),
            textcoords="offset points",
            ha="right" if is_leftmost else "center",
            fontsize="x-small",
            color=color,
        )


def coordinates(points: list[Point], place: str) -> tuple[list[float], list[float]]:
    """Return the x and y of points, `place` being the attribute on the x axis."""
    return [getattr(point, place) for point in points], [point.gain for point in points]


def paper_points() -> dict[str, list[Point]]:
    """Return {label: points} of the paper's tables 7 and 8.

    Table 8 does not have MoE-1-Wide. Its baseline is 4xLSTM-512, which is level with MoE-1-Wide in table 7 (46.0 and
    46.1).
    """
    sources = [
        ("8.3 billion words", paper_tables.BILLION_WORDS_1, "MoE-1-Wide", "test_ppl", 1),
        ("100 billion words", paper_tables.BILLION_WORDS_100, "4xLSTM-512", "test_ppl", 1),
        ("10 billion words", paper_tables.BILLION_WORDS_100, "4xLSTM-512", "ppl_after_a_tenth", 0.1),
    ]
    words = {paper_tables.BILLION_WORDS_1: (paper_tables.WORDS_1, paper_tables.BATCH_WORDS_1)}
    words[paper_tables.BILLION_WORDS_100] = (paper_tables.WORDS_100, paper_tables.BATCH_WORDS_100)
    found = {}
    for label, rows, baseline, measure, share in sources:
        read, batch = words[rows]
        base = next(getattr(row, measure) for row in rows if row.name == baseline)
        found[f"the paper, {label}"] = [
            Point(
                config.num_experts,
                pairs_per_weight(config, share * read),
                tokens_per_expert(config, batch),
                100 * (1 - getattr(row, measure) / base),
            )
            for row in rows
            if EXPERTS.fullmatch(row.name) and (config := read_config(CONFIGS / "lm" / row.config))
        ]
    return found


def measured_points(file: Path, baseline_file: Path, ending: str = "") -> dict[int, list[Point]]:
    """Return {step: points} of a comparison, by the perplexity per token.

    Args:
        file: CSV of `scripts/capacity.py`.
        baseline_file: CSV with MoE-1-Wide of the same seeds, at the same steps.
        ending: ending of the models' names, after the number of experts and `-h`.
    """
    base = {
        (row["seed"], row["step"]): float(row["perplexity_per_token"])
        for row in csv_rows(baseline_file)
        if row["model"] == "MoE-1-Wide"
    }
    found: dict[int, list[Point]] = {}
    for row in csv_rows(file):
        if (match := EXPERTS.fullmatch(row["model"])) and match[2] == ending:
            gain = 100 * (1 - float(row["perplexity_per_token"]) / base[row["seed"], row["step"]])
            point = Point(int(match[1]), float(row["pairs_per_weight"]), float(row["tokens_per_expert"]), gain)
            found.setdefault(int(row["step"]), []).append(point)
    return dict(sorted(found.items()))


def csv_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    sys.exit(main())
