"""The table and the plot of the balancing losses' effect."""

import csv
import importlib.util
from pathlib import Path

import pytest
from pictures import is_drawn
from tiny_runs import CONFIG

from moe_hf.demo.text_corpus import write_demo_corpus
from moe_hf.experiments.balance_report import TABLE_6, BalanceRow, balance_table, plot_balance, read_history
from moe_hf.training.callbacks import STATISTICS

SCRIPT = Path(__file__).parents[2] / "scripts" / "table6.py"


@pytest.fixture
def history(tmp_path):
    file = tmp_path / "expert_history.csv"
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["step", "layer", *STATISTICS])
        writer.writeheader()
        for step, layer, load in ((5, "layers.1", 1.0), (5, "layers.3", 3.0), (10, "layers.1", 0.5)):
            writer.writerow(
                dict.fromkeys(STATISTICS, 0) | {"step": step, "layer": layer, "cv_load": load, "max_over_mean_load": 2}
            )
    return file


def metrics(perplexity: float, loads: list[float]) -> dict[str, float]:
    values = {"eval_perplexity_per_word": perplexity}
    for layer, load in enumerate(loads):
        values |= {f"layers.{layer}/cv_importance": 0.1, f"layers.{layer}/cv_load": load}
        values |= {f"layers.{layer}/max_over_mean_load": 2.0}
    return values


def test_a_row_is_the_mean_over_layers_and_seeds_with_the_papers_row_beside_it(history):
    row = BalanceRow(0.1, 0.1)
    row.add(1, metrics(50.0, [0.2, 0.4]), history)
    assert (
        balance_table([row]).splitlines()[2]
        == "| 0.1 | 0.1 | 50.00 | 0.1000 | 0.3000 | 2.000 | 35.6 / 0.06 / 0.05 / 1.14 |"
    )
    row.add(2, metrics(52.0, [0.5, 0.5]), history)
    assert "| 51.00 (50.00 to 52.00) | 0.1000 (0.1000 to 0.1000) | 0.4000 (0.3000 to 0.5000) |" in balance_table([row])


def test_history_is_averaged_over_layers(history):
    assert read_history(history) == {
        "cv_importance": [(5, 0.0), (10, 0.0)],
        "cv_load": [(5, 2.0), (10, 0.5)],
        "max_over_mean_load": [(5, 2.0), (10, 2.0)],
    }


def test_plot_is_a_picture(history, tmp_path):
    rows = [BalanceRow(*pair) for pair in TABLE_6]
    for row in rows:
        row.add(1, metrics(50.0, [0.2]), history)
    plot_balance(rows, tmp_path / "plot.png")
    assert is_drawn(tmp_path / "plot.png")


def test_script_trains_the_six_rows_and_writes_table_and_plot(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("table6_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    write_demo_corpus(tmp_path, num_train_lines=40, num_valid_lines=8)
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["table6.py", str(tmp_path / "config.yaml"), "--train_files", f"{tmp_path}/train.txt"]
    arguments += ["--output_dir", f"{tmp_path}/runs", "--cache_dir", f"{tmp_path}/cache"]
    monkeypatch.setattr("sys.argv", arguments)
    assert script.main() == 1
    assert "error: validation_files is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--validation_files", f"{tmp_path}/valid.txt"])
    assert script.main() == 0
    table = (tmp_path / "runs" / "table6.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(TABLE_6)
    assert is_drawn(tmp_path / "runs" / "table6.png")
    with (tmp_path / "runs" / "table6.csv").open() as lines:
        models = [line["model"] for line in csv.DictReader(lines)]
    assert list(dict.fromkeys(models)) == [f"importance{w_i:g}-load{w_l:g}" for w_i, w_l in TABLE_6]
