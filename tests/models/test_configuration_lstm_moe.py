"""The configuration: what it refuses, what follows from it, and the paper's parameter counts."""

import pytest
import torch
from tiny_models import tiny_config

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM

PAPER = {
    "LSTM-2048-512": ({"layer_pattern": ["lstm"], "lstm_hidden_size": 2048}, 9.4),
    "4xLSTM-512": ({"layer_pattern": ["lstm"] * 4}, 8.4),
    "MoE-1-Wide": ({"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 4096}, 8.4),
    "MoE-1-Deep": ({"num_experts": 1, "num_experts_per_tok": 1, "num_expert_layers": 4}, 8.4),
    "MoE-4": ({"num_experts": 4}, 8.4),
    "MoE-32": ({"num_experts": 32}, 37.8),
    "MoE-256": ({"num_experts": 256}, 272.9),
}
HIERARCHY = {"num_experts": 8, "num_expert_groups": 4, "num_groups_per_tok": 2, "num_experts_per_tok": 4}


@pytest.mark.parametrize("row", PAPER)
def test_parameter_counts_are_those_of_table_7(row):
    changes, millions = PAPER[row]
    with torch.device("meta"):
        model = LstmMoeForCausalLM(LstmMoeConfig(vocab_size=100, **changes))
    count = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert round(count / 1e6, 1) == millions


def test_a_model_of_137_billion_parameters_is_built_without_memory():
    with torch.device("meta"):
        model = LstmMoeForCausalLM(LstmMoeConfig(num_experts=131072))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.model.layers.parameters()) > 137e9
    experts = model.model.layers[1].experts
    assert experts.up_proj.shape == (131072, 1024, 512) and experts.down_proj.shape == (131072, 512, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 exceeds num_experts=5"),
        ({"gating": "hard"}, "gating='hard'.*noisy_top_k.*strictly_balanced"),
        ({"layer_pattern": ["lstm", "gru"]}, r"layer_pattern=\['lstm', 'gru'\].*'gru' is not a layer.*lstm or moe"),
        ({"layer_pattern": ["moe"]}, r"layer_pattern=\['moe'\] needs at least one 'lstm'"),
        ({"layer_pattern": []}, r"layer_pattern=\[\] needs at least one 'lstm'"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_experts": 0, "num_experts_per_tok": 0}, "num_experts=0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size=-1"),
        ({"num_expert_layers": 0}, "num_expert_layers=0"),
        ({"lstm_hidden_size": 0}, "lstm_hidden_size=0"),
        ({"importance_loss_coef": -0.1}, "importance_loss_coef=-0.1 must not be negative"),
        ({"load_loss_coef": -1}, "load_loss_coef=-1"),
        ({"threshold_loss_coef": -0.5}, "threshold_loss_coef=-0.5 must not be negative"),
        ({"noise_epsilon": -1e-3}, "noise_epsilon=-0.001"),
        ({"num_expert_groups": 0}, "num_expert_groups=0 must be at least 1"),
        ({"num_groups_per_tok": 0}, "num_groups_per_tok=0 must be at least 1"),
        ({"num_expert_groups": 2}, "num_expert_groups=2 does not divide num_experts=5"),
        (HIERARCHY | {"num_groups_per_tok": 5}, "num_groups_per_tok=5 exceeds num_expert_groups=4"),
        (HIERARCHY | {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be a multiple of num_groups_per_tok=2"),
        (HIERARCHY | {"num_experts_per_tok": 6}, "num_experts_per_tok=6 .*num_groups_per_tok=2 .*= 2 experts"),
        (
            HIERARCHY | {"gating": "softmax_top_k"},
            "num_expert_groups=4 needs gating='noisy_top_k', not 'softmax_top_k'",
        ),
        (HIERARCHY | {"gating": "strictly_balanced"}, "needs gating='noisy_top_k', not 'strictly_balanced'"),
        ({"gating": "softmax"}, "num_experts_per_tok=2 must be num_experts=5 .*left out.*softmax_top_k"),
        ({"num_hidden_layers": 7}, "num_hidden_layers=7 .*layer_pattern"),
        ({"num_experts": "five"}, "num_experts"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_number_of_layers_and_layer_types_follow_from_the_pattern():
    config = tiny_config(layer_pattern=("lstm", "moe", "moe", "lstm"))
    assert config.num_hidden_layers == 4
    assert config.layer_types == config.layer_pattern == ["lstm", "moe", "moe", "lstm"]
    assert len(LstmMoeForCausalLM(config).model.layers) == 4


def test_experts_per_token_that_are_left_out_are_four_or_with_dense_gating_all():
    assert LstmMoeConfig().num_experts_per_tok == 4
    assert LstmMoeConfig(gating="softmax_top_k").num_experts_per_tok == 4
    assert LstmMoeConfig(gating="softmax", num_experts=7).num_experts_per_tok == 7
    assert LstmMoeConfig(gating="softmax", num_experts=7, num_experts_per_tok=7).num_experts_per_tok == 7


@pytest.mark.parametrize("changes", [HIERARCHY, {"gating": "softmax", "num_experts_per_tok": None}])
def test_saving_and_loading_keeps_the_gate(changes, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    assert LstmMoeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_saving_and_loading_keeps_every_value(tmp_path):
    config = tiny_config(layer_pattern=["moe", "lstm"], lstm_hidden_size=6, gating="softmax_top_k", dropout=0.25)
    config.save_pretrained(tmp_path)
    loaded = LstmMoeConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.layer_pattern == ["moe", "lstm"] and loaded.lstm_hidden_size == 6
