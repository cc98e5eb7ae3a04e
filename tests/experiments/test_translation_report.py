"""Translation models of one sweep: the script from configuration to tables."""

import csv
import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from matplotlib.axes import Axes
from pictures import is_drawn
from tiny_runs import write_translation_config
from transformers import AutoConfig

from moe_hf import GnmtMoeConfig
from moe_hf.evaluation import count_parameters, ops_per_timestep
from moe_hf.experiments.numbers import mean_and_range, rounded
from moe_hf.experiments.sweep import TRAINING_ARGUMENTS
from moe_hf.experiments.translation_plot import plot_translation
from moe_hf.experiments.translation_report import TranslationRow, translation_table
from moe_hf.model_size import size_of_baseline

ROOT = Path(__file__).parents[2]
VARIANTS = {"dense": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16}, "MoE-4": {}}
CONFIGS = [
    "europarl-en-fr",
    "europarl-en-fr-small",
    "multi30k-en-de",
    "multi30k-en-de-best",
    "multi30k-en-de-wide",
    "multi30k-en-fr",
    "multilingual",
    "multilingual-causes",
    "multilingual-small",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    texts = {"en": ["a dog sees a cat"], "de": ["ein Hund sieht einen Kater"]}
    return write_translation_config(tmp_path_factory.mktemp("compare"), texts, variants=VARIANTS)


@pytest.fixture
def call(call_script):
    return partial(call_script, "compare_translation.py")


def test_from_configuration_to_tables(config, call):
    folder = config.parent / "run"
    assert call(config, "--only", "MoE-4")[0] == 0
    assert "dense" not in (folder / "translation.md").read_text()
    status, output, _ = call(config)
    assert status == 0 and "MoE-4-seed1: finished before" in output
    table = (folder / "translation.md").read_text()
    assert table.strip() in output
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [row[0] for row in rows if len(row) > 1] == [
        *("model", "dense", "MoE-4", "BLEU", "de-en", "en-de", "above dense"),
    ]
    metrics = json.loads((folder / "dense-seed1" / "eval_results.json").read_text())
    dense = next(row for row in rows if row[0] == "dense")
    with (folder / "translation.csv").open() as lines:
        history = list(csv.DictReader(lines))
    assert list(dict.fromkeys(line["model"] for line in history)) == ["dense", "MoE-4"]
    assert history[0].keys() == {"model", "seed", "step", "loss", "bleu", "perplexity_per_word"}
    last = [line for line in history if line["model"] == "dense" and line["bleu"]][-1]
    assert float(last["bleu"]) == pytest.approx(metrics["eval_bleu"], abs=1e-3) and float(history[0]["loss"]) > 0
    assert is_drawn(folder / "translation.png")
    assert dense[3] == rounded(metrics["eval_bleu"]) and dense[6] == rounded(metrics["eval_perplexity_per_word"])


def test_models_of_other_arguments_are_not_put_into_one_table(config, call):
    folder = config.parent / "other"
    assert call(config, "--only", "MoE-4", "--output_dir", folder)[0] == 0
    status, _, error = call(config, "--only", "dense", "--output_dir", folder, "--learning_rate", "0.5")
    assert status == 1 and "learning_rate=0.5 differs from learning_rate=0.01" in error
    assert not (folder / "dense-seed1").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "MoE-8"], "only=MoE-8 is not one of dense, MoE-4"),
        (
            ["--baselines", '{"GPT-2": {"model_type": "gpt2"}}'],
            "baseline 'GPT-2': baseline={'model_type': 'gpt2'} is not an encoder-decoder model",
        ),
        (["--variants", '{"a": {"num_expert": 1}}'], "variant 'a': 'num_expert' is not an argument of the model"),
    ],
)
def test_bad_input_is_named(config, call, arguments, named):
    status, _, error = call(config, *arguments)
    assert status == 1 and named in error, error


def test_validation_pairs_are_needed(config, call, tmp_path):
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    del given["validation_pairs"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    status, _, error = call(tmp_path / "config.yaml")
    assert status == 1 and "no validation pairs are given" in error


def test_the_tables_count_where_a_model_is_better():
    def metrics(en_de, de_en):
        values = {"bleu": (en_de + de_en) / 2, "bleu_lowercase": 30.0, "chrf": 50.0, "perplexity_per_word": 9.0}
        values |= {"bleu_signature": "nrefs:1", "bleu_en-de": en_de, "bleu_de-en": de_en, "bleu_lowercase_en-de": 1.0}
        return {f"eval_{name}": value for name, value in values.items()}

    rows = [
        TranslationRow("dense", 2_000_000, 500_000, [metrics(20.0, 30.0)], [0.5]),
        TranslationRow("MoE", 9_000_000, 510_000, [metrics(20.5, 29.0), metrics(20.1, 30.5)], [0.5, 0.7]),
    ]
    lines = translation_table(rows).splitlines()
    assert lines[2] == "| dense | 2.00 M | 0.500 M | 25.00 | 30.00 | 50.00 | 9.000 | 0.50 |"
    assert lines[5:] == [
        "| BLEU | dense | MoE |",
        "|---|---|---|",
        "| en-de | 20.00 | 20.30 (20.10 to 20.50) |",
        "| de-en | 30.00 | 29.75 (29.00 to 30.50) |",
        "| above dense | - | 1 of 2 |",
    ]
    one = {name: value for name, value in metrics(20.6, 20.6).items() if "-" not in name}
    rows.append(TranslationRow("en-de", 2_000_000, 500_000, [one], [0.5]))
    assert translation_table(rows).splitlines()[6:] == [
        "| BLEU | dense | MoE | bilingual |",
        "|---|---|---|---|",
        "| en-de | 20.00 | 20.30 (20.10 to 20.50) | 20.60 |",
        "| de-en | 30.00 | 29.75 (29.00 to 30.50) | - |",
        "| above dense | - | 1 of 2 | 1 of 1 |",
    ]


def test_the_plot_has_directions_or_the_course_of_one(tmp_path, monkeypatch):
    plotted, plot = [], Axes.plot

    def record(self, xs, ys, *arguments, label=None, **others):
        plotted.append((label, list(xs), list(ys)))
        return plot(self, xs, ys, *arguments, label=label, **others)

    monkeypatch.setattr(Axes, "plot", record)
    curves = {"loss": [(5, 4.0), (10, 3.0)], "bleu": [(10, 25.0)], "perplexity_per_word": []}
    both = {"eval_bleu": 25.0, "eval_bleu_en-de": 20.0, "eval_bleu_de-en": 30.0}
    one = {"eval_bleu": 24.0}

    def row(name, metrics):
        return TranslationRow(name, 2, 1, [metrics, metrics], [0.5, 0.5], [1, 2], [curves, curves])

    plot_translation([row("MoE", both), row("de-en", one)], tmp_path / "plot.png")
    loss = [("MoE", [5, 10], [4.0, 3.0]), (None, [5, 10], [4.0, 3.0])]
    assert plotted == [
        *loss,
        ("MoE", [0, 0, 1, 1], [20.0, 20.0, 30.0, 30.0]),
        ("bilingual", [1, 1], [24.0, 24.0]),
    ]
    plotted.clear()
    plot_translation([row("MoE", one)], tmp_path / "plot.png")
    assert plotted == [*loss, ("MoE", [10], [25.0]), (None, [10], [25.0])]


def test_numbers_have_four_digits():
    assert [rounded(value) for value in (0.0, 0.05, 9.2, 53.617, 999.96, 3362.0, float("nan"))] == [
        *("0", "0.05000", "9.200", "53.62", "1,000.0", "3,362", "nan"),
    ]
    assert mean_and_range([1.0]) == "1.000" and mean_and_range([1.0, 3.0]) == "2.000 (1.000 to 3.000)"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_models_cost_the_same_for_a_token(name):
    given = yaml.safe_load((ROOT / "configs" / "reproduction" / f"{name}.yaml").read_text(encoding="utf-8"))
    own = vars(GnmtMoeConfig()).keys()
    common = {key: value for key, value in given.items() if key in own}
    configs = [
        GnmtMoeConfig(**(common | {key: value for key, value in changes.items() if key in own}))
        for variant, changes in given["variants"].items()
        if not re.fullmatch("..-..|dense-.*", variant)  # bilingual models, and larger dense ones
    ]
    dense, *others = (ops_per_timestep(config) for config in configs)
    assert configs[0].num_experts == 1 and list(given["variants"])[0] == "dense"
    for config, ops in zip(configs[1:], others, strict=True):
        assert ops == pytest.approx(dense, rel=0.05) and count_parameters(config) > 2 * count_parameters(configs[0])


@pytest.mark.parametrize("name", ["multilingual", "multilingual-small"])
def test_bilingual_models_read_what_their_names_say(name):
    given = yaml.safe_load((ROOT / "configs" / "reproduction" / f"{name}.yaml").read_text(encoding="utf-8"))
    variants = {name: changes for name, changes in given["variants"].items() if re.fullmatch("..-..", name)}
    assert len(variants) == 12
    for direction, changes in variants.items():
        for part, pairs in (("train", changes["train_pairs"]), ("val", changes["validation_pairs"])):
            (files,) = pairs
            names = [Path(files[side]).name for side in ("source_files", "target_files")]
            assert names == [f"{part}.{language}.gz" for language in direction.split("-")]


def test_the_transformer_beside_the_best_costs_the_same_for_a_token():
    given = yaml.safe_load((ROOT / "configs/reproduction/multi30k-en-de-best.yaml").read_text(encoding="utf-8"))
    own = vars(GnmtMoeConfig()).keys()
    dense = {key: value for key, value in (given | given["variants"]["dense"]).items() if key in own}
    baseline = {k: v for k, v in given["baselines"]["Transformer"].items() if k not in TRAINING_ARGUMENTS}
    ops = size_of_baseline(AutoConfig.for_model(**baseline, vocab_size=given["vocab_size"], pad_token_id=0))[1]
    assert ops == pytest.approx(ops_per_timestep(GnmtMoeConfig(**dense)), rel=0.05)


def test_no_test_set_is_named():
    files = sorted((ROOT / "configs" / "reproduction").glob("*.yaml"))
    assert len(files) > len(CONFIGS)
    for file in files:
        assert not re.search(r"\btest_", file.read_text(encoding="utf-8")), file
