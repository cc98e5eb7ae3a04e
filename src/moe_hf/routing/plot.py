"""Plots the routing of a text."""

from pathlib import Path

import numpy as np

from .page_data import LARGEST_MATRIX, pair_matrix
from .statistics import LayerRouting

NUM_BARS = 20
MORE = "#1b7837"  # "more often than by chance": the green of PRGn and of the report's page


def plot_routing(routing: dict[str, LayerRouting], file: str | Path) -> None:
    """Plot a row for each MoE layer: load and importance of its experts, gate entropy, and pairs of experts.

    Args:
        routing: the result of `collect_routing`.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4 * len(routing)), layout="constrained")
    for row, (name, layer) in zip(figure.subplots(len(routing), 3, squeeze=False), routing.items()):
        _plot_balance(row[0], layer)
        row[0].set_title(f"{name}: load and importance")
        row[1].hist(layer.entropy[layer.num_used > 0], bins=32, color="C0")
        row[1].set(title="gate entropy", xlabel="entropy of a token's gate values, in bits", ylabel="tokens")
        _plot_pairs(figure, row[2], layer)
    figure.savefig(file, dpi=100)


def _plot_balance(axes, layer: LayerRouting) -> None:
    for values, label in ((layer.load, "load"), (layer.importance, "importance")):
        if values.any():
            axes.plot(np.sort(values / values.mean())[::-1], label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="experts, the busiest first", ylabel="times the mean")
    axes.set_ylim(bottom=0)
    axes.legend()


def _plot_pairs(figure, axes, layer: LayerRouting) -> None:
    if layer.pairs is None or layer.pairs.num_inside + layer.pairs.num_across == 0:
        axes.set_title("no pairs of experts to compare")
        axes.set_axis_off()
        return
    if layer.num_experts <= LARGEST_MATRIX:
        matrix = pair_matrix(layer.pairs, layer.load)
        with np.errstate(divide="ignore"):
            picture = axes.imshow(np.clip(np.log2(matrix), -3, 3), cmap="PRGn", vmin=-3, vmax=3)
        figure.colorbar(picture, label="log2(tokens shared / by chance)")
        axes.set(title="experts that share tokens", xlabel="expert", ylabel="expert")
        axes.locator_params(integer=True)
        return
    first, second, counts = layer.pairs.pairs()
    expected = layer.pairs.expected(first, second, layer.load)
    best = np.argsort(-(counts - expected) / np.sqrt(expected), kind="stable")[:NUM_BARS]
    axes.barh([f"{first[i]} + {second[i]}" for i in best], (counts / expected)[best], color=MORE)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set(title="pairs of experts furthest above chance", xlabel="times as often as by chance")
