"""Reproduces tables 2, 3 and 5 of the paper: translation models with the same computation per token."""

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from ..model_size import size_of_any
from .numbers import mean_and_range
from .run_curves import Curves, read_curves

MEASURES = {
    "bleu": "BLEU",
    "bleu_lowercase": "lowercased",
    "chrf": "chrF",
    "perplexity_per_word": "perplexity per word",
}
CURVES = {"loss": "loss", "bleu": "eval_bleu", "perplexity_per_word": "eval_perplexity_per_word"}
DIRECTION = re.compile("eval_bleu_(?!lowercase)(.+-.+)")  # eval_bleu_en-de


@dataclass
class TranslationRow:
    """The results of one model.

    Attributes:
        name: the model's name.
        parameters: number of parameters without embedding and softmax.
        ops: number of operations per token without embedding and softmax.
        seeds: the seeds, in the order of the runs.
        metrics: for each seed, the results of the last evaluation.
        seconds: for each seed, the seconds per step.
        curves: for each seed, `CURVES` during training.
    """

    name: str
    parameters: int
    ops: int
    metrics: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)

    def bleu(self, direction: str | None = None) -> list[float]:
        """Return the BLEU of each seed, for one direction or for all directions together."""
        return [metrics[f"eval_bleu_{direction}" if direction else "eval_bleu"] for metrics in self.metrics]

    def directions(self) -> list[str]:
        """Return the directions of a multilingual model; [] for a model of one direction."""
        return [found[1] for name in self.metrics[0] if (found := DIRECTION.fullmatch(name))]


def add_translation_run(rows: dict[str, TranslationRow], name: str, seed: int, folder: str | Path) -> None:
    """Add a finished run to the row of its model.

    Args:
        rows: {name: row}; the model's row is added if it is missing.
        name: the model's name.
        seed: the run's seed.
        folder: the run's folder.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    row = rows.setdefault(name, TranslationRow(name, *size_of_any(config)))
    row.seeds.append(seed)
    row.curves.append(read_curves(folder, CURVES))
    row.metrics.append(json.loads((folder / "eval_results.json").read_text(encoding="utf-8")))
    # A resumed run reports its speed since the last checkpoint, which is enough for the time of a step.
    speed = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))["train_steps_per_second"]
    row.seconds.append(1 / speed if speed else float("nan"))


def translation_table(rows: list[TranslationRow]) -> str:
    """Return the rows as a Markdown table, followed by a table of BLEU by direction for multilingual models.

    All numbers are means over the seeds, with ranges. The first table has the mean BLEU over the directions.

    The second table has a column for each multilingual model, and one column for all bilingual models. A bilingual
    model has a direction as its name, such as "en-de". The last line counts the directions in which a model's mean is
    above the first model's mean.
    """
    heads = ["model", "parameters", "operations per time step", *MEASURES.values(), "s a step"]
    lines = _head(heads)
    for row in rows:
        size = [f"{row.parameters / 1e6:.2f} M", f"{row.ops / 1e6:.3f} M"]
        measured = [mean_and_range([metrics[f"eval_{name}"] for metrics in row.metrics]) for name in MEASURES]
        lines.append(_line([row.name, *size, *measured, f"{statistics.median(row.seconds):.2f}"]))
    several = [row for row in rows if row.directions()]
    if several:
        lines += ["", *_by_direction(several, bilingual_rows(rows))]
    return "\n".join(lines)


def bilingual_rows(rows: list[TranslationRow]) -> dict[str, TranslationRow]:
    """Return {direction: the model with that name} for the directions of the multilingual models in `rows`."""
    directions = {name for row in rows for name in row.directions()}
    return {row.name: row for row in rows if row.name in directions}


def _by_direction(rows: list[TranslationRow], bilingual: dict[str, TranslationRow]) -> list[str]:
    directions = rows[0].directions()
    columns = {row.name: {name: row.bleu(name) for name in directions} for row in rows}
    if bilingual:
        columns["bilingual"] = {name: row.bleu() for name, row in bilingual.items()}
    lines = _head(["BLEU", *columns])
    for name in directions:
        lines.append(_line([name, *(mean_and_range(of[name]) if name in of else "-" for of in columns.values())]))
    (_, base), *others = columns.items()
    counts = [
        f"{sum(statistics.fmean(of[name]) > statistics.fmean(base[name]) for name in of)} of {len(of)}"
        for _, of in others
    ]
    return lines + [_line([f"above {rows[0].name}", "-", *counts])]


def _head(names: list[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
