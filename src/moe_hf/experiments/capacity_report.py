"""Reproduces figure 2 and table 7 of the paper: perplexity against capacity or computation per token."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..model_size import size_of_any
from .numbers import mean_and_range, rounded
from .run_curves import Curves, read_curves
from .text_per_expert import pairs_per_weight, tokens_per_expert

MEASURES = {"perplexity_per_word": "eval_perplexity_per_word", "perplexity_per_token": "eval_perplexity_per_token"}
SIZES = {"parameters": "parameters without embedding and softmax", "ops": "operations per token"}


@dataclass
class CapacityRow:
    """The results of one model.

    Attributes:
        name: the model's name.
        parameters: number of parameters without embedding and softmax.
        ops: number of operations per token without embedding and softmax.
        seeds: the seeds, in the order of the runs.
        perplexities: for each seed, the last perplexity per word on the validation text.
        token_perplexities: for each seed, the last perplexity per token on the validation text.
        seconds: for each seed, the seconds per step.
        curves: for each seed, `MEASURES` during training, with the text that an expert has seen.
        pairs_per_weight: (token, expert) pairs for each weight of an expert; None for a model without experts.
        tokens_per_expert: tokens of a step for each expert on average; None for a model without experts.
    """

    name: str
    parameters: int
    ops: int
    seeds: list[int] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)
    token_perplexities: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    pairs_per_weight: float | None = None
    tokens_per_expert: float | None = None


def add_run(rows: dict[str, CapacityRow], name: str, seed: int, folder: str | Path, tokens_per_step: int) -> None:
    """Add a finished run to the row of its model.

    Args:
        rows: {name: row}; the model's row is added if it is missing.
        name: the model's name.
        seed: the run's seed.
        folder: the run's folder.
        tokens_per_step: tokens of a step, of all processes.
    """
    config = AutoConfig.from_pretrained(folder)
    row = rows.setdefault(name, CapacityRow(name, *size_of_any(config)))
    steps = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    row.pairs_per_weight = pairs_per_weight(config, steps * tokens_per_step)
    row.tokens_per_expert = tokens_per_expert(config, tokens_per_step)
    # A resumed run reports its speed since the last checkpoint, which is enough for the time of a step.
    speed = json.loads((Path(folder) / "train_results.json").read_text(encoding="utf-8"))["train_steps_per_second"]
    curves = read_curves(folder, MEASURES)
    row.seeds.append(seed)
    row.perplexities.append(curves["perplexity_per_word"][-1][1])
    row.token_perplexities.append(curves["perplexity_per_token"][-1][1])
    row.seconds.append(1 / speed if speed else float("nan"))
    row.curves.append(with_text_per_expert(curves, config, tokens_per_step))


def with_text_per_expert(curves: Curves, config: PreTrainedConfig, tokens_per_step: int) -> Curves:
    """Return the curves with two more, at the same steps: "pairs_per_weight" and "tokens_per_expert" of a step.

    Args:
        curves: {measure: [(step, value)]} of one run.
        config: the model's configuration; both curves of a model without experts are empty.
        tokens_per_step: tokens of a step, of all processes.
    """
    steps = sorted({step for points in curves.values() for step, _ in points})
    if tokens_per_expert(config, tokens_per_step) is None:
        return curves | {"pairs_per_weight": [], "tokens_per_expert": []}
    return curves | {
        "pairs_per_weight": [(step, pairs_per_weight(config, step * tokens_per_step)) for step in steps],
        "tokens_per_expert": [(step, tokens_per_expert(config, tokens_per_step)) for step in steps],
    }


def capacity_table(rows: list[CapacityRow], compared_with: str) -> str:
    """Return the rows as a Markdown table of means over the seeds, with the range if there are several seeds.

    Args:
        rows: the models.
        compared_with: name of the model with which the perplexities are compared.
    """
    base = next(row for row in rows if row.name == compared_with)
    lines = [
        "| model | parameters | operations per token | pairs per weight | tokens per expert and step | "
        f"perplexity per word | over {compared_with} | per token | over {compared_with} | s a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = [
            "-" if row.pairs_per_weight is None else rounded(row.pairs_per_weight),
            "-" if row.tokens_per_expert is None else f"{row.tokens_per_expert:,.1f}".removesuffix(".0"),
            *_compared(row.perplexities, base.perplexities),
            *_compared(row.token_perplexities, base.token_perplexities),
        ]
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.2f} M | {row.ops / 1e6:.3f} M | {' | '.join(measured)} | "
            f"{statistics.median(row.seconds):.2f} |"
        )
    return "\n".join(lines)


def _compared(values: list[float], base: list[float]) -> tuple[str, str]:
    """Return the mean, with the range if there are several values, and its difference from `base` in percent."""
    return mean_and_range(values), f"{100 * (statistics.fmean(values) / statistics.fmean(base) - 1):+.1f} %"


def _ratio(sizes: list[int]) -> float:
    return max(sizes) / min(sizes)


def plot_capacity(rows: list[CapacityRow], file: str | Path) -> None:
    """Plot perplexity against the size of the models (figure 2), and perplexity during training.

    The size is the number of parameters (figure 2, left). For models that differ more in computation, it is the number
    of operations per token (figure 2, right).

    Args:
        rows: the models.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    spread = {name: _ratio([getattr(row, name) for row in rows]) for name in SIZES}
    size = max(SIZES, key=spread.get)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    from_lowest = sorted(rows, key=lambda row: statistics.fmean(row.perplexities))
    for number, row in enumerate(rows):
        color, marker = f"C{number % 10}", "os^D"[number // 10 % 4]
        left.plot([getattr(row, size)] * len(row.perplexities), row.perplexities, marker, color=color)
        place = (getattr(row, size), statistics.fmean(row.perplexities))
        # Labels alternate between both sides, because models of the same size may be close to each other.
        offset, side = ((5, 4), "left") if from_lowest.index(row) % 2 else ((-5, -10), "right")
        left.annotate(row.name, place, xytext=offset, textcoords="offset points", ha=side, fontsize="small")
        for seed_number, curves in enumerate(row.curves):
            label = row.name if seed_number == 0 else None
            right.plot(*zip(*curves["perplexity_per_word"]), color=color, linewidth=1, label=label)
    left.set_xscale("log")
    left.margins(x=0.25)
    left.set_xlabel(SIZES[size])
    right.set_xlabel("step")
    right.set_yscale("log")
    right.legend(fontsize="x-small")
    for axes in (left, right):
        axes.set_ylabel("validation perplexity per word")
    figure.savefig(file, dpi=110)
