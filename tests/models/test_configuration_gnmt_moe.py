"""The configuration of the translation model: refusals, derived values, and shared matrices."""

import pytest
import torch
from tiny_models import FEEDINGS, sentences, tiny_gnmt, tiny_gnmt_config

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration
from moe_hf.model_size import count_parameters, ops_per_timestep


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "dot"}, "attention_type='dot' is not known, use one of product, additive"),
        ({"attention_feeding": "none"}, "attention_feeding='none' .* use one of recurrent, input, parallel"),
        (
            {"attention_feeding": "parallel", "decoder_layer_pattern": ["lstm", "moe"]},
            r"attention_feeding='parallel' needs an 'lstm' above .*decoder_layer_pattern=\['lstm', 'moe'\]",
        ),
        ({"encoder_layer_pattern": ["lstm", "gru"]}, r"encoder_layer_pattern=\['lstm', 'gru'\].*lstm or moe"),
        ({"encoder_layer_pattern": ["moe"]}, r"encoder_layer_pattern=\['moe'\] needs at least one 'lstm'"),
        (
            {"encoder_layer_pattern": ["moe", "lstm"]},
            "must start with 'lstm', or encoder_bidirectional_first be False",
        ),
        ({"decoder_layer_pattern": ["lstm", 3]}, "decoder_layer_pattern"),
        ({"decoder_layer_pattern": []}, r"decoder_layer_pattern=\[\] needs at least one 'lstm'"),
        (
            {"decoder_layer_pattern": ["moe", "lstm"]},
            r"decoder_layer_pattern=\['moe', 'lstm'\] must start with 'lstm'",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"num_hidden_layers": 7}, "num_hidden_layers=7 .*decoder_layer_pattern"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_gnmt_config(**changes)


def test_defaults_are_the_papers_for_translation():
    config = GnmtMoeConfig()
    assert (config.dropout, config.importance_loss_coef, config.load_loss_coef) == (0.4, 0.01, 0.01)
    assert (config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok) == (512, 2048, 4)
    assert (config.attention_type, config.attention_feeding) == ("product", "recurrent")
    assert config.is_encoder_decoder and config.share_embeddings and config.label_smoothing == 0


def test_a_deep_output_counts_as_a_layer():
    plain, deep = tiny_gnmt_config(), tiny_gnmt_config(deep_output=True)
    assert not plain.deep_output  # the paper's
    assert count_parameters(deep) - count_parameters(plain) == 8 * 24 + 8
    assert ops_per_timestep(deep) - ops_per_timestep(plain) == 8 * 24


def test_numbers_of_layers_follow_from_the_patterns():
    config = tiny_gnmt_config(encoder_layer_pattern=("lstm",), decoder_layer_pattern=("lstm", "moe", "lstm"))
    assert (config.encoder_layers, config.decoder_layers, config.num_hidden_layers) == (1, 3, 3)
    assert config.get_text_config(decoder=True) is config
    model = GnmtMoeForConditionalGeneration(config)
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (1, 3)


def logits(model):
    source, target = torch.stack(sentences(4, 4)), torch.stack(sentences(3, 3, seed=1))
    return model(input_ids=source, decoder_input_ids=target).logits


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_which_matrices_are_shared(shared, tied):
    model = GnmtMoeForConditionalGeneration(tiny_gnmt_config(share_embeddings=shared, tie_word_embeddings=tied))
    source, target = model.model.encoder.embed_tokens, model.model.decoder.embed_tokens
    assert (target is None) == shared
    assert (model.lm_head.weight is (source if shared else target).weight) == tied


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary_resizes_every_matrix(shared, tied):
    model = GnmtMoeForConditionalGeneration(tiny_gnmt_config(share_embeddings=shared, tie_word_embeddings=tied)).eval()
    before = logits(model)
    model.resize_token_embeddings(29)
    assert model.config.vocab_size == 29
    after = logits(model)
    assert after.shape[-1] == 29
    torch.testing.assert_close(after[..., :23], before)
    new = torch.full((1, 2), 28)
    assert model(input_ids=new, labels=new).loss.isfinite()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tied and shared)


def test_a_model_of_eight_billion_parameters_is_built_without_memory():
    config = GnmtMoeConfig(lstm_hidden_size=2048, num_experts=2048, num_expert_groups=32)
    with torch.device("meta"):
        model = GnmtMoeForConditionalGeneration(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 8.7


def test_parameters_have_the_names_that_plans_and_adapters_match_on():
    names = dict(tiny_gnmt(lstm_hidden_size=12).named_parameters())
    for feeding in FEEDINGS:
        model = GnmtMoeForConditionalGeneration(tiny_gnmt_config(attention_feeding=feeding))
        attention = [name for name, _ in model.named_parameters() if "attention" in name]
        prefix = "model.decoder.layers.0.attention."
        assert attention == [prefix + name for name in ("source_weight", "query_weight", "score_weight")]
    for stack, index in (("encoder", 2), ("decoder", 1)):
        assert names[f"model.{stack}.layers.{index}.gate.weight"].shape == (5, 8)
        assert names[f"model.{stack}.layers.{index}.experts.up_proj"].shape == (5, 8, 8)
    assert names["model.encoder.layers.1.weight_ih"].shape == (48, 16)
    assert names["model.decoder.layers.2.weight_ih"].shape == (48, 16)
    assert names["model.encoder.layers.0.backward_lstm.weight_hr"].shape == (8, 12)


def test_experts_of_both_stacks_stand_in_the_plans():
    model = GnmtMoeForConditionalGeneration(tiny_gnmt_config())
    for stack in ("encoder", "decoder"):
        assert model.ep_plan[f"model.{stack}.layers.*.experts"] == "ep_dispatch_experts"
        assert model.ep_plan[f"model.{stack}.layers.*.experts.up_proj"] == "grouped_gemm"
        assert model.tp_plan[f"model.{stack}.layers.*.experts.down_proj"] == "rowwise"
