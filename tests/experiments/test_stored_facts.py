"""Random facts as a measure of capacity: their text, the bits that a model stores, and the script's whole run."""

import math
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.errors import InputError
from moe_hf.experiments.stored_facts import FactsArguments, facts_text, stored_bits

ROOT = Path(__file__).parents[2]
CONFIG = """
num_symbols: 8
hidden_size: 16
layer_pattern: [lstm, moe, lstm]
num_experts_per_tok: 2
moe_intermediate_size: 8
dropout: 0.0
tie_word_embeddings: false
per_device_train_batch_size: 64
learning_rate: 0.03
lr_scheduler_type: constant
max_steps: 150
logging_steps: 50
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
variants:
  one: {num_experts: 1, num_experts_per_tok: 1}
  four: {num_experts: 4}
"""


class Oracle:
    """A model whose prediction after two symbols is `logits(first, second)`."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache):
        last = torch.stack([self.logits(*pair) for pair in input_ids.tolist()])
        return SimpleNamespace(logits=last[:, None].expand(-1, 2, -1))


@pytest.fixture
def facts(tmp_path):
    file = tmp_path / "facts.txt"
    file.write_text(facts_text(8, seed=1), encoding="utf-8")
    tokenizer = train_tokenizer(file.read_text().splitlines(), kind="word", vocab_size=10)
    values = {}
    for line in file.read_text().splitlines():
        first, second, value = tokenizer(line)["input_ids"]
        values[first, second] = value
    return file, tokenizer, values


def test_each_pair_of_symbols_is_one_fact_with_a_random_value():
    lines = [line.split() for line in facts_text(32, seed=0).splitlines()]
    assert len({(first, second) for first, second, _ in lines}) == len(lines) == 32**2
    counts = Counter(value for *_, value in lines)
    assert counts.keys() == {first for first, *_ in lines}
    assert max(counts.values()) < 70  # 32 expected, standard deviation 5.6
    assert facts_text(32, seed=0) != facts_text(32, seed=1)


def test_a_model_that_knows_all_values_stores_all_bits(facts):
    file, tokenizer, values = facts
    model = Oracle(lambda *pair: 100.0 * torch.nn.functional.one_hot(torch.tensor(values[pair]), len(tokenizer)))
    assert stored_bits(model, tokenizer, file) == pytest.approx(64 * 3)


def test_a_model_that_knows_only_the_symbols_stores_nothing(facts):
    file, tokenizer, values = facts
    symbols = torch.tensor([-100.0 if token in ("<eos>", "<unk>") else 0.0 for token in tokens_of(tokenizer)])
    assert stored_bits(Oracle(lambda *pair: symbols), tokenizer, file) == pytest.approx(0, abs=1e-6)


def test_half_the_values_are_half_the_bits(facts):
    file, tokenizer, values = facts
    symbols = torch.tensor([-100.0 if token in ("<eos>", "<unk>") else 0.0 for token in tokens_of(tokenizer)])
    known = dict(list(values.items())[::2])

    def logits(*pair):
        return 100.0 * torch.nn.functional.one_hot(torch.tensor(known[pair]), 10) if pair in known else symbols

    assert stored_bits(Oracle(logits), tokenizer, file) == pytest.approx(32 * 3)


def test_wrong_values_cost_bits(facts):
    file, tokenizer, values = facts
    wrong = {pair: 2 + (value - 1) % 8 for pair, value in values.items()}
    model = Oracle(lambda *pair: 5.0 * torch.nn.functional.one_hot(torch.tensor(wrong[pair]), 10))
    assert stored_bits(model, tokenizer, file) < -64 * 3


def test_a_file_of_other_lines_is_refused(facts, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("s0 s1 s2\ns0 s1\n", encoding="utf-8")
    with pytest.raises(InputError, match="'s0 s1' must have three tokens"):
        stored_bits(Oracle(lambda *pair: torch.zeros(10)), facts[1], other)


def test_one_symbol_is_refused():
    with pytest.raises(InputError, match="num_symbols=1"):
        FactsArguments(num_symbols=1)


def test_the_script_trains_models_that_store_the_facts(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG + f"output_dir: {tmp_path}/run\ncache_dir: {tmp_path}/cache\n")
    script = str(ROOT / "scripts/stored_facts.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0
    table = (tmp_path / "run/stored-facts.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    rows = {cells[1]: cells for line in table.splitlines()[2:] for cells in [[c.strip() for c in line.split("|")]]}
    assert list(rows) == ["one", "four"]
    shares = [float(cells[6].removesuffix(" %")) for cells in rows.values()]
    assert all(50 < share <= 100 for share in shares)  # of 64 * 3 bits
    bits, share = float(rows["four"][5].removesuffix(" k")), shares[1]
    assert bits * 1000 == pytest.approx(64 * math.log2(8) * share / 100, abs=60)


def tokens_of(tokenizer):
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
