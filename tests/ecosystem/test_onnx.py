"""A decoding step in ONNX Runtime, exported to files and loaded again."""

import copy

import pytest
import torch
from tiny_models import assert_same
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

from tests.models.test_compile_and_export import FAMILIES, MODELS, decoding_step


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@MODELS
@torch.no_grad()
def test_steps_are_those_of_the_model(family, changes, tmp_path):
    model = FAMILIES[family].model(torch.float32, **changes)
    model.set_experts_implementation("batched_mm")  # uses only operations that ONNX supports
    OnnxExporter().export(model, decoding_step(family, model, 2), config=OnnxConfig()).save_pretrained(tmp_path)
    exported = ExportedModel.from_pretrained(tmp_path)
    inputs = decoding_step(family, model, 5)
    state, expected_state = (copy.deepcopy(inputs["past_key_values"]) for _ in range(2))
    for _ in range(2):
        output = exported(**{**inputs, "past_key_values": state})
        expected = model(**{**inputs, "past_key_values": expected_state}, use_cache=True)
        assert_same(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
        state, expected_state = output.past_key_values, expected.past_key_values
    assert state.get_seq_length() == expected_state.get_seq_length() == 7
