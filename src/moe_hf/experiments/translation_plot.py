"""Plots a comparison of translation models: their training loss and their BLEU."""

from pathlib import Path

from .translation_report import TranslationRow, bilingual_rows


def plot_translation(rows: list[TranslationRow], file: str | Path) -> None:
    """Plot the training loss and the BLEU of the models.

    BLEU is plotted during training, or for multilingual models in each direction at the end. Bilingual models (see
    `translation_table`) then share one kind of mark, and their loss is not plotted.

    Args:
        rows: the models.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bilingual = bilingual_rows(rows)
    whole = [row for row in rows if row.name not in bilingual]
    directions = next((row.directions() for row in whole if row.directions()), [])
    for number, row in enumerate(whole):
        _plot_curves(left, row, "loss", f"C{number}")
        if not directions:
            _plot_curves(right, row, "bleu", f"C{number}")
        elif row.directions():
            _plot_directions(right, {name: row.bleu(name) for name in directions}, row.name, f"C{number}")
    if bilingual:
        columns = {name: bilingual[name].bleu() if name in bilingual else [] for name in directions}
        _plot_directions(right, columns, "bilingual", "k")
    left.set_xlabel("step")
    left.set_ylabel("training loss")
    right.set_ylabel("validation BLEU")
    if directions:
        right.set_xticks(range(len(directions)), directions, rotation=45)
        right.grid(axis="x", linewidth=0.3)
    else:
        right.set_xlabel("step")
    right.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _plot_curves(axes, row: TranslationRow, measure: str, color: str) -> None:
    for number, curves in enumerate(row.curves):
        label = row.name if number == 0 else None
        steps, values = zip(*curves[measure]) if curves[measure] else ((), ())
        axes.plot(steps, values, color=color, linewidth=1, marker=".", label=label)


def _plot_directions(axes, bleu: dict[str, list[float]], label: str, color: str) -> None:
    points = [(place, value) for place, values in enumerate(bleu.values()) for value in values]
    axes.plot(*zip(*points), "o", color=color, markersize=4, label=label)
