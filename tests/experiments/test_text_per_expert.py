"""Pairs per weight and tokens per expert: the arithmetic, the paper's models, the committed results and their plot."""

import csv
import runpy
import shutil
from pathlib import Path

import pytest
from pictures import is_drawn
from tiny_models import tiny_gnmt_config, tiny_lm_config
from transformers import AutoConfig

from moe_hf import LstmMoeConfig
from moe_hf.commands.table import CONFIGS, read_config
from moe_hf.data.arguments import DataArguments
from moe_hf.experiments.paper_tables import BATCH_WORDS_1, BATCH_WORDS_100, WORDS_1, WORDS_100
from moe_hf.experiments.sweep import SweepArguments, baseline_runs, variant_runs
from moe_hf.experiments.text_per_expert import pairs_per_weight, tokens_per_expert, weights_per_expert
from moe_hf.training.arguments import LmModelArguments, MoeTrainingArguments, parse_arguments

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "reproduction" / "results"
CLASSES = (LmModelArguments, DataArguments, MoeTrainingArguments, SweepArguments)


# Width 8 and 8 hidden units: an expert has 2 * 8 * 8 = 128 weights.
@pytest.mark.parametrize(
    ("changes", "weights", "tokens", "pairs"),
    [
        ({"num_experts": 5, "num_experts_per_tok": 2}, 128, 256, 2),
        ({"num_experts": 20, "num_experts_per_tok": 4, "num_expert_groups": 5}, 128, 128, 1),
        (
            {"num_experts": 20, "num_experts_per_tok": 6, "num_expert_groups": 4, "num_groups_per_tok": 3},
            128,
            192,
            1.5,
        ),
        ({"num_experts": 5, "num_experts_per_tok": None, "gating": "softmax"}, 128, 640, 5),
        ({"num_experts": 1, "num_experts_per_tok": 1, "num_expert_layers": 3}, 128 + 2 * 64, 640, 2.5),
        ({"num_experts": 5, "layer_pattern": ["lstm", "moe", "lstm", "moe"]}, 128, 256, 2),
    ],
    ids=["flat", "two groups", "three groups", "dense", "deep", "two layers"],
)
def test_an_expert_gets_its_share_of_the_pairs(changes, weights, tokens, pairs):
    config = tiny_lm_config(**changes)
    assert weights_per_expert(config) == weights
    assert tokens_per_expert(config, 640) == tokens
    assert pairs_per_weight(config, 640) == pairs


def test_a_translator_counts_the_tokens_of_one_layer():
    assert pairs_per_weight(tiny_gnmt_config(), 640) == 2


@pytest.mark.parametrize(
    "config",
    [tiny_lm_config(layer_pattern=["lstm", "lstm"]), AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2)],
    ids=["LSTMs", "GPT-2"],
)
def test_a_model_without_experts_has_no_such_numbers(config):
    assert weights_per_expert(config) is tokens_per_expert(config, 640) is pairs_per_weight(config, 640) is None


@pytest.mark.parametrize(
    ("name", "words", "batch", "pairs", "tokens"),
    [
        ("moe-4096-h", WORDS_1, BATCH_WORDS_1, 8.29e9 * 4 / 4096 / 2**20, 292.97),
        ("moe-256", WORDS_1, BATCH_WORDS_1, 8.29e9 * 4 / 256 / 2**20, 4687.5),
        ("100b-moe-65536-h", WORDS_100, BATCH_WORDS_100, 5.8208, 152.59),
        ("100b-moe-131072-h", WORDS_100, BATCH_WORDS_100, 2.9104, 76.29),
    ],
)
def test_the_papers_models(name, words, batch, pairs, tokens):
    config = read_config(CONFIGS / "lm" / f"{name}.yaml")
    assert pairs_per_weight(config, words) == pytest.approx(pairs, rel=1e-4)
    assert tokens_per_expert(config, batch) == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("file", "name", "step_tokens"),
    [
        ("capacity.csv", "capacity", 4096),
        ("capacity-seed2.csv", "capacity", 4096),
        ("capacity-no-balancing.csv", "capacity", 4096),
        ("capacity-pilots.csv", "capacity-pilots", 4096),
        ("capacity-pilots-seed2.csv", "capacity-pilots", 4096),
        ("capacity-long.csv", "capacity-long", 16384),
        ("capacity-long-seed2.csv", "capacity-long", 16384),
        ("computation.csv", "computation", 4096),
    ],
)
def test_the_committed_results_have_the_numbers_of_their_configuration(file, name, step_tokens):
    path = ROOT / "configs" / "reproduction" / f"{name}.yaml"
    model, data, training, sweep = parse_arguments([str(path), "--use_cpu", "true"], CLASSES)
    runs = variant_runs(model, data, training, sweep.variants, [1])
    configs = {
        run.name: LstmMoeConfig(vocab_size=data.vocab_size, **run.model_args.config_arguments()) for run in runs
    }
    per_step = {run.name: run.tokens_per_step for run in runs + baseline_runs(data, training, sweep.baselines, [1])}
    assert set(per_step.values()) == {step_tokens}
    with (RESULTS / file).open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            config = configs.get(row["model"])  # None for GPT-2
            tokens = int(row["step"]) * per_step[row["model"]]
            pairs = None if config is None else pairs_per_weight(config, tokens)
            of_step = None if config is None else tokens_per_expert(config, per_step[row["model"]])
            assert row["pairs_per_weight"] == ("" if pairs is None else f"{pairs:.3f}")
            assert row["tokens_per_expert"] == ("" if of_step is None else f"{of_step:.3f}")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "reproduction_plots.py"))


def test_the_points_of_the_plot(script):
    ours = script["measured_points"](RESULTS / "capacity.csv", RESULTS / "capacity.csv")
    assert list(ours) == [1100, 2200, 3300, 4400]
    last = {point.experts: point for point in ours[4400] if point.experts != 256}
    assert set(last) == {4, 32, 1024, 4096}  # the models with one expert are not points
    assert last[4096].gain == pytest.approx(0.13, abs=0.01)
    assert (last[4096].pairs, last[4096].tokens) == (1.074, 4)
    pilots = script["measured_points"](RESULTS / "capacity-pilots.csv", RESULTS / "capacity.csv", "-fine-decided")
    (fine,) = pilots[4400]
    assert fine.experts == 4096 and fine.gain == pytest.approx(100 * (1 - 48.134 / 58.31), abs=0.01)
    long_run = script["measured_points"](*[RESULTS / "capacity-long.csv"] * 2)[3900]
    gains = {point.experts: point.gain for point in long_run}
    assert gains[1024] == pytest.approx(100 * (1 - 39.477 / 51.603), abs=0.01)
    assert gains[4096] == pytest.approx(100 * (1 - 38.348 / 51.603), abs=0.01)  # of half the size
    late, early = (script["paper_points"]()[f"the paper, {words} billion words"][-1] for words in (100, 10))
    assert late.experts == early.experts == 131072 and late.tokens == early.tokens
    assert late.pairs == pytest.approx(10 * early.pairs)
    assert late.gain == pytest.approx(100 * (1 - 29.2 / 47.0)) and early.gain == pytest.approx(100 * (1 - 39.8 / 54.5))


@pytest.mark.parametrize(
    ("function", "name"), [("plot_pairs_per_weight", "pairs-per-weight.png"), ("plot_experts", "capacity-experts.png")]
)
def test_the_plot_is_drawn_from_the_committed_results(script, tmp_path, function, name):
    for file in RESULTS.glob("capacity*.csv"):
        shutil.copy(file, tmp_path)
    script[function](tmp_path)
    assert is_drawn(tmp_path / name)
