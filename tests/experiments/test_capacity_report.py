"""Models of different capacity: the script from configuration to table, history and plot."""

import csv
import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from matplotlib.axes import Axes
from pictures import is_drawn
from tiny_runs import CONFIG, write_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_hf import LstmMoeConfig
from moe_hf.errors import InputError
from moe_hf.evaluation import count_parameters, ops_per_timestep
from moe_hf.experiments.capacity_report import CapacityRow, capacity_table, plot_capacity
from moe_hf.experiments.sweep import SweepArguments
from moe_hf.model_size import size_of_baseline
from moe_hf.training.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
VARIANTS = {"4xLSTM": {"layer_pattern": ["lstm"] * 4}, "MoE-4": {"num_experts": 4}}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 12, "n_positions": 14}
BASELINES = {"GPT-2": GPT2 | {"tie_word_embeddings": False, "learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity")
    write_config(folder)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    models = {"variants": VARIANTS, "baselines": BASELINES}
    (folder / "config.yaml").write_text(text + "\n" + yaml.safe_dump(models), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture
def call(call_script):
    return partial(call_script, "capacity.py")


def test_from_configuration_to_table(config, call):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2"]
    folder = config.parent / "run"
    assert call(config, "--only", "4xLSTM", *evaluation)[0] == 0
    assert "MoE-4" not in (folder / "capacity.md").read_text()
    assert call(config, "--only", "GPT-2", *evaluation)[0] == 0
    status, output, _ = call(config, *evaluation)
    assert status == 0 and "4xLSTM-seed1: finished before" in output and "GPT-2-seed1: finished before" in output
    rows = [line.split(" | ") for line in (folder / "capacity.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 4xLSTM", "| MoE-4", "| GPT-2"]
    with (folder / "capacity.csv").open() as lines:
        history = list(csv.DictReader(lines))
    assert [(row["model"], row["step"]) for row in history] == [
        (m, s) for m in [*VARIANTS, "GPT-2"] for s in ("2", "4")
    ]
    assert float(rows[0][5].replace(",", "")) == pytest.approx(float(history[1]["perplexity_per_word"]), rel=1e-3)
    # MoE-4 routes the 28 tokens of a step to two of four experts, which have 2 * 8 * 8 weights.
    assert [row[3:5] for row in rows] == [["-", "-"], ["0.4375", "14"], ["-", "-"]]
    text = [(row["pairs_per_weight"], row["tokens_per_expert"]) for row in history]
    assert text == [("", "")] * 2 + [("0.219", "14.000"), ("0.438", "14.000")] + [("", "")] * 2
    assert is_drawn(folder / "capacity.png")


def test_a_baseline_reads_as_many_tokens_a_step(config, call):
    assert call(config, "--only", "GPT-2", "--eval_strategy", "steps", "--eval_steps", "2")[0] == 0
    folder = config.parent / "run" / "GPT-2-seed1"
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    ours = yaml.safe_load(CONFIG)
    tokens = ours["per_device_train_batch_size"] * ours["window_length"]
    assert run["window_length"] == 14 and run["per_device_train_batch_size"] * 14 == tokens
    assert run["learning_rate"] == 1e-3 and "learning_rate" not in run["baseline"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "GPT2LMHeadModel"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id


def test_a_baseline_is_counted_as_ours_are():
    config = AutoConfig.for_model(**GPT2, tie_word_embeddings=False, vocab_size=50)
    parameters, ops = size_of_baseline(config)
    d, inner, window = 8, 12, 14
    matrices = 4 * d * d + 2 * d * inner
    biases_and_norms = (3 * d + d) + (inner + d) + 2 * 2 * d + 2 * d
    assert parameters == matrices + biases_and_norms
    # Position t (from 1) scores t positions, d multiply-and-adds each, and adds up as many values.
    attention = sum(2 * t * d for t in range(1, window + 1)) / window
    assert ops == matrices + attention
    tied = AutoConfig.for_model(**GPT2, vocab_size=50)
    assert size_of_baseline(tied) == (parameters, ops)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt3"}, "baseline=.*gpt3.* is not a model"),
        ({"weight_decay": 0.1}, "'GPT-2': 'weight_decay' is not an argument of the model"),
        ({"learning_rate": "fast"}, "'GPT-2': learning_rate='fast' must be of type float"),
        ({"n_positions": 9}, "'GPT-2': its windows of 9 must divide the 28 tokens of a step"),
    ],
)
def test_a_wrong_baseline_is_named(config, call, changes, named):
    baselines = json.dumps({"GPT-2": GPT2 | changes})
    status, _, error = call(config, "--baselines", baselines, "--only", "GPT-2", "--output_dir", config.parent / "x")
    assert status == 1 and re.search(named, error), error


def test_the_table_compares_means_with_the_baselines():
    rows = [
        CapacityRow("4xLSTM", 2_000_000, 131_072, [1], [50.0], [10.0], [0.25]),
        CapacityRow("MoE-256", 40_000_000, 131_500, [1, 2], [39.0, 41.0], [9.0, 9.2], [0.5, 0.75], [], 17.1875, 3.25),
    ]
    lines = capacity_table(rows, "4xLSTM").splitlines()
    assert lines[2] == "| 4xLSTM | 2.00 M | 0.131 M | - | - | 50.00 | +0.0 % | 10.00 | +0.0 % | 0.25 |"
    assert lines[3] == (
        "| MoE-256 | 40.00 M | 0.132 M | 17.19 | 3.2 | 40.00 (39.00 to 41.00) | -20.0 % | 9.100 (9.000 to 9.200) | "
        "-9.0 % | 0.62 |"
    )


def test_the_shipped_models_cost_the_same_for_a_token():
    given = yaml.safe_load((ROOT / "configs" / "reproduction" / "capacity.yaml").read_text(encoding="utf-8"))
    names = ("hidden_size", "layer_pattern", "num_experts_per_tok", "moe_intermediate_size", "vocab_size")
    gpt2 = given["baselines"]["GPT-2"]
    common = {name: given[name] for name in names}
    configs = {name: LstmMoeConfig(**(common | changes)) for name, changes in given["variants"].items()}
    sizes = {name: count_parameters(config) for name, config in configs.items()}
    ops = {name: ops_per_timestep(config) for name, config in configs.items()}
    # Each gate has two weights of the width for each expert, which at 256 experts are a fifth of so small a layer.
    gates = {name: ops[name] - ops["4xLSTM"] for name in ops}
    assert gates["MoE-1-Wide"] == gates["MoE-1-Deep"] == 2 * 64 and gates["MoE-4"] == 2 * 4 * 64
    assert gates["MoE-256"] == 2 * 256 * 64
    rising = [sizes[name] for name in ("MoE-4", "MoE-32", "MoE-256", "MoE-1024-h", "MoE-4096-h")]
    assert rising == sorted(rising) and rising[-1] > 60_000_000
    baseline = size_of_baseline(AutoConfig.for_model(**gpt2, vocab_size=given["vocab_size"]))
    assert baseline[1] == pytest.approx(ops["4xLSTM"], rel=0.01) and gpt2["n_positions"] == 256
    assert sizes["MoE-4"] == pytest.approx(sizes["4xLSTM"], rel=0.01)


def test_the_shipped_models_of_one_capacity_differ_in_computation_only():
    given = yaml.safe_load((ROOT / "configs" / "reproduction" / "computation.yaml").read_text(encoding="utf-8"))
    beside = yaml.safe_load((ROOT / "configs" / "reproduction" / "capacity.yaml").read_text(encoding="utf-8"))
    own = {"output_dir", "variants", "baselines", "hidden_size", "moe_intermediate_size"}
    assert {name: value for name, value in given.items() if name not in own} == {
        name: value for name, value in beside.items() if name not in own
    }
    common = {name: given[name] for name in ("layer_pattern", "num_experts_per_tok", "vocab_size")}
    low, medium, high = (LstmMoeConfig(**common, **changes) for changes in given["variants"].values())
    for config in (low, high):
        assert count_parameters(config) == pytest.approx(count_parameters(medium), rel=0.05)
    assert ops_per_timestep(medium) / ops_per_timestep(low) == pytest.approx(4, rel=0.06)
    assert ops_per_timestep(high) / ops_per_timestep(medium) == pytest.approx(3.3, rel=0.01)


def test_the_plot_is_against_what_differs(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda axes, label: labels.append(label))
    for sizes in ((1_000_000, 1000), (2_000_000, 5000)), ((1_000_000, 1000), (9_000_000, 5000)):
        rows = [
            CapacityRow(
                "a", *sizes[0], [1], [50.0], [10.0], [0.25], [{"perplexity_per_word": [(1, 60.0), (2, 50.0)]}]
            ),
            CapacityRow("b", *sizes[1], [1], [40.0], [9.0], [0.25], [{"perplexity_per_word": [(1, 55.0), (2, 40.0)]}]),
        ]
        plot_capacity(rows, tmp_path / "plot.png")
    assert labels == ["operations per token", "step", "parameters without embedding and softmax", "step"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--variants", "{"], "variants is not valid JSON"),
        (["--variants", '["a"]'], "variants=.* must be {name: {argument: value}}"),
        (["--baselines", '["a"]'], "baselines=.* must be {name: {argument: value}}"),
        (["--variants", '{"a/b": {}}'], "variants: name 'a/b' must consist of letters"),
        (["--variants", '{"a": {}}', "--only", "b"], "only=b is not one of a"),
        ([], "variants is empty"),
    ],
)
def test_wrong_variants_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        parse_arguments(arguments, (SweepArguments,))[0].check_names()


def test_validation_text_is_needed(config, call, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG + yaml.safe_dump({"variants": VARIANTS, "train_files": ["a.txt"]}))
    status, _, error = call(tmp_path / "config.yaml", "--output_dir", tmp_path / "run")
    assert status == 1 and "validation_files is empty" in error
