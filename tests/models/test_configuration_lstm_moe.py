"""The configuration of the language model: refusals, derived values, and the paper's parameter counts."""

import pytest
import torch
from tiny_models import tiny_lm_config

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
        ({"layer_pattern": ["lstm", "gru"]}, r"layer_pattern=\['lstm', 'gru'\].*'gru' is not a layer.*lstm or moe"),
        ({"layer_pattern": ["moe"]}, r"layer_pattern=\['moe'\] needs at least one 'lstm'"),
        ({"layer_pattern": []}, r"layer_pattern=\[\] needs at least one 'lstm'"),
    ],
)
def test_an_impossible_pattern_is_refused_by_name(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_lm_config(**changes)


def test_number_of_layers_and_layer_types_follow_from_the_pattern():
    config = tiny_lm_config(layer_pattern=("lstm", "moe", "moe", "lstm"))
    assert config.num_hidden_layers == 4
    assert config.layer_types == config.layer_pattern == ["lstm", "moe", "moe", "lstm"]
    assert len(LstmMoeForCausalLM(config).model.layers) == 4


def test_experts_per_token_that_are_left_out_are_four_or_with_dense_gating_all():
    assert LstmMoeConfig().num_experts_per_tok == 4
    assert LstmMoeConfig(gating="softmax_top_k").num_experts_per_tok == 4
    assert LstmMoeConfig(gating="softmax", num_experts=7).num_experts_per_tok == 7
    assert LstmMoeConfig(gating="softmax", num_experts=7, num_experts_per_tok=7).num_experts_per_tok == 7
