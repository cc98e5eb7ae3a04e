#!/usr/bin/env python3
"""Draw two plots of docs/reproduction/ that the experiments do not draw, from the numbers in its results folder.

    python scripts/reproduction_plots.py [--folder docs/reproduction/results]

Writes multi30k-published.png, from the CSV files of three comparisons, and specialisation.png, from specialisation.md.
"""

import argparse
import csv
import sys
from pathlib import Path

from moe_hf.commands import run_command
from moe_hf.extra_packages import require_packages
from moe_hf.writing import check_folder

MULTI30K = {
    "multi30k-en-de-recipe.csv": {"dense": "dense LSTM", "MoE-32": "MoE-32"},
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


def plot_multi30k(folder: Path) -> None:
    """Plot validation BLEU and perplexity per word during training, for models trained with the published recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, measure, label in zip(
        figure.subplots(1, 2), ("bleu", "perplexity_per_word"), ("validation BLEU", "validation perplexity per word")
    ):
        for file, labels in MULTI30K.items():
            with open(folder / file, newline="", encoding="utf-8") as lines:
                rows = [row for row in csv.DictReader(lines) if row[measure]]
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


if __name__ == "__main__":
    sys.exit(main())
