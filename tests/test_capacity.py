"""Models of different capacity: the script from its configuration to its table, history and plot."""

import csv
import runpy
from pathlib import Path

import pytest
import yaml
from tiny_runs import CONFIG, write_config

from moe_hf import LstmMoeConfig
from moe_hf.errors import InputError
from moe_hf.evaluation import count_parameters, ops_per_timestep
from moe_hf.evaluation.capacity_report import CapacityRow, capacity_table
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.sweep import SweepArguments

ROOT = Path(__file__).parents[1]
VARIANTS = {"4xLSTM": {"layer_pattern": ["lstm"] * 4}, "MoE-4": {"num_experts": 4}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity")
    write_config(folder)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text + "\n" + yaml.safe_dump({"variants": VARIANTS}), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["capacity.py", *map(str, arguments)])
        status = runpy.run_path(str(ROOT / "scripts" / "capacity.py"))["main"]()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_from_configuration_to_table(config, call):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2"]
    folder = config.parent / "run"
    assert call(config, "--only", "4xLSTM", *evaluation)[0] == 0
    assert "MoE-4" not in (folder / "capacity.md").read_text()
    status, output, _ = call(config, *evaluation)
    assert status == 0 and "4xLSTM-seed1: finished before" in output
    rows = [line.split(" | ") for line in (folder / "capacity.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 4xLSTM", "| MoE-4"]
    with (folder / "capacity.csv").open() as lines:
        history = list(csv.DictReader(lines))
    assert [(row["model"], row["step"]) for row in history] == [(m, s) for m in VARIANTS for s in ("2", "4")]
    assert float(rows[0][3]) == pytest.approx(float(history[1]["perplexity_per_word"]), abs=0.06)
    assert (folder / "capacity.png").stat().st_size > 10_000


def test_the_table_compares_means_with_the_baselines():
    rows = [
        CapacityRow("MoE-1-Wide", 2_000_000, 131_072, [1], [50.0], [0.25]),
        CapacityRow("MoE-256", 40_000_000, 131_500, [1, 2], [39.0, 41.0], [0.5, 0.75]),
    ]
    lines = capacity_table(rows, "MoE-1-Wide").splitlines()
    assert lines[2] == "| MoE-1-Wide | 2.00 M | 0.131 M | 50.0 | +0.0 % | 0.25 |"
    assert lines[3] == "| MoE-256 | 40.00 M | 0.132 M | 40.0 (39.0 to 41.0) | -20.0 % | 0.62 |"


def test_the_shipped_models_cost_the_same_for_a_token():
    given = yaml.safe_load((ROOT / "configs" / "reproduction" / "capacity.yaml").read_text(encoding="utf-8"))
    names = ("hidden_size", "layer_pattern", "num_experts_per_tok", "moe_intermediate_size", "vocab_size")
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
    assert sizes["MoE-4"] == pytest.approx(sizes["4xLSTM"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--variants", "{"], "variants is not valid JSON"),
        (["--variants", '["a"]'], "must be {name: {model argument: value}}"),
        (["--variants", '{"a": {}}', "--only", "b"], "only=b is none of the variants a"),
        ([], "variants is empty"),
    ],
)
def test_wrong_variants_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        parse_arguments(arguments, (SweepArguments,))[0].chosen()


def test_validation_text_is_needed(config, call, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG + yaml.safe_dump({"variants": VARIANTS, "train_files": ["a.txt"]}))
    status, _, error = call(tmp_path / "config.yaml", "--output_dir", tmp_path / "run")
    assert status == 1 and "validation_files is empty" in error
