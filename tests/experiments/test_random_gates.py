"""Trained gates beside random gates: the draws, what each expert tells, the script and its errors."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny_gnmt, tiny_lm
from tiny_reports import save_gnmt, save_lm

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.errors import InputError
from moe_hf.experiments.numbers import rounded
from moe_hf.experiments.random_gates import draw_gates, specialisation_table
from moe_hf.routing.inputs import load_for_routing, open_text
from moe_hf.routing.observe import moe_layers, observe_gates
from moe_hf.routing.specialisation import (
    bits_of_experts,
    most_frequent_classes,
    mutual_information,
    specialisation,
)
from moe_hf.routing.statistics import collect_routing


def test_the_experts_bits_are_the_parts_of_the_mutual_information():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 30, 5000)
    experts = (tokens + random.integers(0, 4, 5000)) % 6
    bits = bits_of_experts(experts, tokens, num_experts=7, num_classes=20, num_shuffles=2)
    share = np.bincount(experts, minlength=7) / 5000
    classes = most_frequent_classes(tokens, 20)
    shuffle = np.random.default_rng(0)
    control = np.mean([mutual_information(shuffle.permutation(experts), classes) for _ in range(2)])
    assert (share * bits).sum() == pytest.approx(mutual_information(experts, classes) - control)
    assert bits[6] == 0


def test_an_expert_that_chooses_is_told_from_one_that_gets_anything():
    random = np.random.default_rng(1)
    tokens = random.integers(0, 16, 8000)
    experts = np.where(tokens < 4, 0, 1 + random.integers(0, 3, 8000))  # 1 to 3 get the same tokens
    bits = bits_of_experts(experts, tokens, num_experts=4)
    assert bits[0] == pytest.approx(2, abs=0.05)
    assert bits[1:] == pytest.approx([np.log2(16 / 12)] * 3, abs=0.05)
    assert abs(bits_of_experts(random.permutation(experts), tokens, num_experts=4)).max() < 0.02


def test_tokens_without_expert_do_not_count():
    experts, tokens = np.array([0, 1, -1, 0, 1, 0] * 50), np.array([3, 4, 3, -1, 4, 3] * 50)
    assert bits_of_experts(experts, tokens, num_experts=2) == pytest.approx([1, 1], abs=0.05)
    assert bits_of_experts(np.array([-1]), np.array([3]), num_experts=2).tolist() == [0, 0]


@pytest.mark.parametrize("config", [{}, {"num_experts": 6, "num_expert_groups": 2, "num_experts_per_tok": 4}])
def test_gates_alone_are_drawn_as_wide_as_trained_ones(config):
    model = tiny_lm(torch.float32, **config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, again, other = (draw_gates(copy.deepcopy(model), model, seed=seed).state_dict() for seed in (3, 3, 4))
    for name, value in drawn.items():
        assert torch.equal(value, again[name])
        if ".gate." not in name:
            assert torch.equal(value, before[name])
        else:
            assert not torch.equal(value, before[name]) and not torch.equal(value, other[name])
            assert 0.4 < value.std() / before[name].std() < 2.5


def test_gates_that_were_never_trained_are_drawn_too():
    model = LstmMoeForCausalLM(LstmMoeConfig(vocab_size=20, hidden_size=16, num_experts=4, num_experts_per_tok=2))
    drawn = draw_gates(copy.deepcopy(model), model, seed=0)
    for block in moe_layers(drawn).values():
        assert 0.6 < block.gate.weight.std() < 1.4


def test_drawn_gates_without_thresholds_choose_k_experts():
    model = tiny_gnmt(torch.float32, gating="strictly_balanced").eval()
    drawn = draw_gates(copy.deepcopy(model), model, seed=0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    seen = {}
    with torch.no_grad(), observe_gates(drawn, lambda name, output: seen.update({name: output})):
        drawn(input_ids=ids, decoder_input_ids=ids)
    assert len(seen) == 2
    for output in seen.values():
        assert ((output.top_k_weights > 0).sum(dim=1) == model.config.num_experts_per_tok).all()


def test_the_rows_are_what_the_models_they_name_do(tmp_path):
    folder = save_lm(tmp_path)
    files = [str(folder / "text.txt")]
    rows = [line.strip("| ").split(" | ") for line in specialisation_table(str(folder), files, seeds=[5]).splitlines()]
    trained, tokenizer = load_for_routing(str(folder))
    torch.manual_seed(5)
    untrained = LstmMoeForCausalLM(trained.config)
    text = open_text(trained, tokenizer, files)
    models = [trained, draw_gates(copy.deepcopy(trained), trained, 5), draw_gates(untrained, trained, 5)]
    for model, row in zip(models, rows[2:], strict=True):
        (routing,) = collect_routing(model, text.batches(model.config), {"": len(text.sides[""].ids)}).values()
        strongest, expected = routing.experts[:, 0], [str(len(text.sides[""].ids))]
        bits, counts = [], []
        for ids in (text.sides[""].ids, text.sides[""].following):
            found = specialisation(strongest, ids)
            bits.append(rounded(found.bits - found.control_mean))
            counts.append(str((bits_of_experts(strongest, ids, trained.config.num_experts) >= 1).sum()))
        assert row[2:] == expected + bits + counts
    assert len({tuple(row[3:5]) for row in rows[2:]}) == 3 and all(row[3] != row[4] for row in rows[2:])


@pytest.mark.parametrize("family", ["lm", "gnmt"])
def test_the_script_writes_three_rows_for_each_layer(family, tmp_path, call_script):
    folder = {"lm": save_lm, "gnmt": save_gnmt}[family](tmp_path)
    files = ["text.txt"] if family == "lm" else ["text.en", "text.de"]
    output = tmp_path / "table.md"
    arguments = [folder, *(folder / name for name in files), "-o", output, "--seeds", 0, 1]
    status, printed, _ = call_script("specialisation.py", *arguments)
    assert status == 0 and output.read_text().strip() in printed
    rows = [line.strip("| ").split(" | ") for line in output.read_text().splitlines()[2:]]
    layers = ["layers.1"] if family == "lm" else ["decoder.layers.1", "encoder.layers.2"]
    kinds = ["trained", "trained model, gates drawn", "untrained model, gates drawn"]
    assert [row[:2] for row in rows] == [[layer, kind] for layer in layers for kind in kinds]
    for row in rows:
        assert ("to" in row[3]) == (row[1] != "trained") and 0 <= float(row[5].split()[0]) <= 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"seeds": []}, r"seeds=\[\] at least one"),
        ({"model": "nowhere"}, "model=nowhere: cannot be loaded"),
        ({"target_language": "de"}, "target_language='de' is for translation models"),
    ],
)
def test_bad_input_is_named(changes, named, tmp_path):
    arguments = {"model": str(save_lm(tmp_path)), "files": [str(tmp_path / "text.txt")]} | changes
    with pytest.raises(InputError, match=named):
        specialisation_table(**arguments)


def test_a_model_without_experts_is_refused(tmp_path):
    folder = save_lm(tmp_path, layer_pattern=["lstm"])
    with pytest.raises(InputError, match="no MoE layer to report on"):
        specialisation_table(str(folder), [str(folder / "text.txt")])
