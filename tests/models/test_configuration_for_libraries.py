"""Attributes of a configuration that other libraries read; config.json contains none of them."""

import copy
import json

import pytest
from tiny_models import tiny_gnmt_config, tiny_lm_config

from moe_hf import GnmtMoeForConditionalGeneration, LstmMoeForCausalLM
from moe_hf.families import FAMILIES
from moe_hf.hub import with_code
from moe_hf.models import configuration_moe

MODELS = {
    "lstm_moe": (tiny_lm_config, LstmMoeForCausalLM),
    "gnmt_moe": (tiny_gnmt_config, GnmtMoeForConditionalGeneration),
}
FAMILY = pytest.mark.parametrize("family", MODELS)


def saved(config, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@FAMILY
def test_trl_finds_an_auto_map_that_is_not_saved(family, tmp_path):
    config = MODELS[family][0]()
    assert config.auto_map == {}
    assert "auto_map" not in config.to_dict()
    assert "auto_map" not in saved(config, tmp_path)


@FAMILY
def test_peft_finds_a_number_of_heads_that_is_not_saved(family, tmp_path, monkeypatch):
    config = MODELS[family][0]()
    assert config.num_attention_heads == config.to_dict()["num_attention_heads"] == 1
    assert "num_attention_heads" not in saved(config, tmp_path)
    assert "num_attention_heads" not in config.to_diff_dict()
    warnings = []
    monkeypatch.setattr(configuration_moe.logger, "warning", warnings.append)
    assert type(config)(num_attention_heads=8).num_attention_heads == 1
    assert warnings == ["num_attention_heads=8 has no effect: these models have one head, or do not use attention"]


@FAMILY
def test_a_configuration_is_the_same_after_a_round_trip(family, tmp_path):
    config = MODELS[family][0]()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert copy.deepcopy(config).auto_map == {}


@FAMILY
@pytest.mark.usefixtures("classes_as_before")
def test_code_is_registered_with_one_configuration_and_not_with_all(family, tmp_path):
    make_config, model_class = MODELS[family]
    with_code(model_class(make_config())).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == FAMILIES[family].auto_map
    assert type(make_config()).from_pretrained(tmp_path).auto_map == FAMILIES[family].auto_map
    assert make_config().auto_map == {}


@FAMILY
@pytest.mark.usefixtures("classes_as_before")
def test_the_librarys_own_way_to_save_code_writes_the_auto_map(family, tmp_path):
    make_config, model_class = MODELS[family]
    auto_class = [name for name in FAMILIES[family].auto_map if name.startswith("AutoModelFor")][0]
    model_class.register_for_auto_class(auto_class)
    model_class(make_config()).save_pretrained(tmp_path)
    saved_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved_map == {auto_class: FAMILIES[family].auto_map[auto_class]}
    assert make_config().auto_map == {}
