"""The supported versions are stated once, and another version of Transformers is refused."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gnmt, tiny_lm
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from moe_hf.families import FAMILIES
from moe_hf.model_code import add_code
from moe_hf.models.versions import TESTED_WITH, TRANSFORMERS

ROOT = Path(__file__).parents[2]
MODELS = {"lstm_moe": tiny_lm, "gnmt_moe": tiny_gnmt}


def test_the_bounds_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers{TRANSFORMERS}" in project["dependencies"]


def test_what_it_was_tested_with_has_the_pinned_versions():
    pins = dict(re.findall("^([^#=]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["transformers"] in TESTED_WITH["Transformers"].split(" and ")
    assert pins["torch"] == TESTED_WITH["PyTorch"]


@pytest.mark.parametrize("version", ["4.57.3", "5.22.1", "6.0.0"])
@pytest.mark.parametrize("family", MODELS)
def test_exported_code_refuses_another_transformers(family, version, tmp_path, monkeypatch):
    MODELS[family](torch.float32).save_pretrained(tmp_path)
    add_code(tmp_path)
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "transformers" else installed(name)
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # which is another test's folder
    with pytest.raises(ImportError, match=rf"^transformers>=5.23,<6 is required .*found transformers=={version}\.$"):
        get_class_from_dynamic_module(FAMILIES[family].auto_map["AutoConfig"], tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert get_class_from_dynamic_module(FAMILIES[family].auto_map["AutoConfig"], tmp_path).model_type == family
