#!/usr/bin/env python3
"""Runs Transformers' common model tests on the models; the tests come from the installed version's source package.

    python tests/hf_suite/run.py [arguments of pytest]

The source package contains tests/test_*.py, but not the folders beside these files. Empty classes therefore replace
the generation and export tests; the distributed tests are not run here. The tests compare two forward passes in
training mode, so the models have neither dropout nor gating noise (noiseless.json). tests/ covers dropout and noise.
"""

import inspect
import json
import subprocess
import sys
import tarfile
import unittest
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto

import moe_hf

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "runs" / "hf_suite"
HOME = CACHE / f"transformers-{transformers.__version__}"
REPLACED = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        'config_common_kwargs = {"output_hidden_states": True, "return_dict": False, "dtype": "float16"}\n'
    ),
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STACKS = {"encoder_layer_pattern": ["lstm", "moe"], "decoder_layer_pattern": ["lstm", "moe"]}
NOISELESS = json.loads((HERE / "noiseless.json").read_text(encoding="utf-8"))


class Family(NamedTuple):
    """One model type: its classes and its tiny configuration."""

    config: type
    base: type
    head: type
    sizes: dict
    head_names: dict

    @property
    def is_seq2seq(self) -> bool:
        return self.head is moe_hf.GnmtMoeForConditionalGeneration


FAMILIES = (
    Family(
        moe_hf.LstmMoeConfig,
        moe_hf.LstmMoeModel,
        moe_hf.LstmMoeForCausalLM,
        SIZES | {"layer_pattern": ["lstm", "moe"]} | NOISELESS["lstm_moe"],
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    Family(
        moe_hf.GnmtMoeConfig,
        moe_hf.GnmtMoeModel,
        moe_hf.GnmtMoeForConditionalGeneration,
        SIZES | STACKS | {"decoder_start_token_id": 1} | NOISELESS["gnmt_moe"],
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
)


def obtain_tests() -> None:
    """Unpacks the library's tests into the cache, once."""
    if not HOME.is_dir():
        requirement = f"transformers=={transformers.__version__}"
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(CACHE)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        with tarfile.open(CACHE / f"{HOME.name}.tar.gz") as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(f"{HOME.name}/tests/")]
            archive.extractall(CACHE, members=members, filter="data")
    for name, text in REPLACED.items():
        path = HOME / "tests" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


class Tester:
    """One tiny configuration and one batch, under the names that the library's tests use."""

    def __init__(self, parent, family: Family):
        self.parent, self.family = parent, family
        self.config_class, self.base_model_class = family.config, family.base
        self.causal_lm_class = None if family.is_seq2seq else family.head
        self.batch_size, self.seq_length, self.is_training = 5, 8, True
        self.encoder_seq_length = self.decoder_seq_length = self.key_length = 8
        self.hidden_size, self.num_hidden_layers, self.vocab_size, self.pad_token_id = 32, 2, 99, 0

    def get_config(self):
        return self.config_class(**self.family.sizes)

    def prepare_config_and_inputs_for_common(self):
        positions, rows = torch.arange(self.seq_length), torch.arange(self.batch_size)
        mask = (positions[None] < self.seq_length - rows[:, None] % 4).long()
        inputs = {"input_ids": torch.randint(3, 99, mask.shape), "attention_mask": mask}
        if self.family.is_seq2seq:
            inputs["decoder_input_ids"] = torch.randint(3, 99, mask.shape)
            inputs["decoder_attention_mask"] = torch.ones_like(mask)
        return self.get_config(), inputs


def suite(family: Family) -> type:
    """Returns the library's test classes, applied to the models of a family."""
    from tests import test_configuration_common, test_modeling_common, test_training_mixin

    # The tests distinguish base models from models with a head by these tables. `AutoModel.register` does not change
    # the tables.
    modeling_auto.MODEL_MAPPING_NAMES[family.config.model_type] = family.base.__name__
    family.head_names[family.config.model_type] = family.head.__name__

    def set_up(self):
        transformers.set_seed(0)
        self.model_tester = Tester(self, family)
        properties = ["hidden_size", "num_hidden_layers"]
        self.config_tester = test_configuration_common.ConfigTester(
            self, config_class=family.config, common_properties=properties, **family.sizes
        )

    body = {
        "__module__": __name__,
        "setUp": set_up,
        "test_config": lambda self: self.config_tester.run_common_tests(),
        "all_model_classes": (family.base, family.head),
        "is_encoder_decoder": family.is_seq2seq,
        "has_attentions": False,
        "test_all_params_have_gradient": False,  # a batch this small leaves experts idle
        "test_can_init_all_missing_weights_before_2023": True,
        # This test requires the mixin that an empty class replaces here.
        "test_generation_tester_mixin_inheritance": None,
    }
    mixins = [test_modeling_common.ModelTesterMixin]
    if not family.is_seq2seq:
        mixins.append(test_training_mixin.TrainingTesterMixin)  # its tests generate from a bare prompt
    return type(f"{family.base.__name__}Suite", (*mixins, unittest.TestCase), body)


if __name__ == "__main__":
    import pytest

    obtain_tests()
    sys.path.insert(0, str(HOME))
    options = ["-q", "-c", "/dev/null", "--rootdir", str(HERE), "--noconftest", "-p", "no:cacheprovider"]
    options += ["-W", "ignore", "--tb=short"]
    sys.exit(pytest.main([*options, "-rs", inspect.getfile(Tester), *sys.argv[1:]]))
elif str(HOME) in sys.path:
    LstmMoeSuite, GnmtMoeSuite = (suite(family) for family in FAMILIES)
