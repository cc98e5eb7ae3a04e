"""Generation with weights on the disk (accelerate's big-model inference) equals the loaded model's bit for bit."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import GNMT, LM, padded, sentences
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM, MoeBlock
from moe_hf.generation import gnmt_beam_search
from moe_hf.models import experts_choice
from moe_hf.offload import experts_device_map

FAMILIES = {"lstm_moe": (LM, AutoModelForCausalLM), "gnmt_moe": (GNMT, AutoModelForSeq2SeqLM)}
GATES = {
    "flat": {},
    "hierarchical": {"num_experts": 12, "num_expert_groups": 4, "num_experts_per_tok": 4},
    "balanced": {"gating": "strictly_balanced"},
}
IDS, MASK = padded(sentences(3, 6), 6, "left")


def checkpoint(folder, family, **changes):
    """Returns a model saved to the folder and loaded from it.

    Its weights then have the same addresses, up to multiples of 64 bytes, as weights on the disk. With other addresses
    some processors round a product differently.
    """
    model = FAMILIES[family][0].model(torch.float32, **changes)
    model.tie_weights()
    model.save_pretrained(folder)
    return FAMILIES[family][1].from_pretrained(folder, experts_implementation="eager").eval()


def offloaded(folder, family, **options):
    model = FAMILIES[family][1].from_pretrained(folder, experts_implementation="eager", **options).eval()
    assert any(param.is_meta for param in model.parameters())
    return model


def size_of(module):
    return sum(param.nbytes for param in module.parameters())


def budgets(model):
    """Memory limits: none, half of the model plus room for its largest layer, and one byte less than the model."""
    largest = max(size_of(module) for module in model.modules() if isinstance(module, MoeBlock))
    return [0, largest + size_of(model) // 2, size_of(model) - 1]


def logits(model):
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs).logits


def generate(model, **options):
    torch.manual_seed(0)
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=6, **options)


def outputs(model):
    searches = ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2})
    return [logits(model), *(generate(model, **options) for options in searches)]


def assert_same_outputs(model, loaded):
    assert all(map(torch.equal, outputs(model), outputs(loaded)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_device_map_below_the_models_size_changes_nothing(family, tied, tmp_path):
    loaded = checkpoint(tmp_path, family, tie_word_embeddings=tied)
    expected = outputs(loaded)
    for budget in budgets(loaded):
        model = offloaded(tmp_path, family, device_map="auto", max_memory={"cpu": budget})
        in_memory = sum(param.nbytes for param in model.parameters() if not param.is_meta)
        assert in_memory <= budget
        assert all(map(torch.equal, outputs(model), expected))
        assert in_memory == sum(param.nbytes for param in model.parameters() if not param.is_meta)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_alone_on_the_disk_change_nothing(family, gate, tmp_path):
    loaded = checkpoint(tmp_path, family, **GATES[gate])
    model = offloaded(tmp_path, family, device_map=experts_device_map(AutoConfig.from_pretrained(tmp_path)))
    on_disk = {name for name, param in model.named_parameters() if param.is_meta}
    assert on_disk == {name for name, _ in model.named_parameters() if ".experts." in name}
    assert_same_outputs(model, loaded)


@pytest.mark.parametrize(
    "changes", [{"attention_feeding": "parallel"}, {"attention_type": "additive"}, {"deep_output": True}]
)
def test_every_kind_of_attention_and_output_can_be_on_the_disk(changes, tmp_path):
    loaded = checkpoint(tmp_path, "gnmt_moe", lstm_hidden_size=6, share_embeddings=False, **changes)
    model = offloaded(tmp_path, "gnmt_moe", device_map="auto", max_memory={"cpu": 0})
    assert_same_outputs(model, loaded)


def test_gnmt_beam_search_with_the_model_on_the_disk(tmp_path):
    loaded = checkpoint(tmp_path, "gnmt_moe")
    model = offloaded(tmp_path, "gnmt_moe", device_map="auto", max_memory={"cpu": 0})
    options = {"num_beams": 3, "custom_generate": gnmt_beam_search, "length_alpha": 0.2, "coverage_beta": 0.2}
    assert torch.equal(generate(model, **options), generate(loaded, **options))


@pytest.mark.parametrize(
    ("family", "changes", "number"), [("lstm_moe", {}, 3), ("gnmt_moe", {}, 7), ("gnmt_moe", {"deep_output": True}, 8)]
)
def test_no_layer_is_split_between_devices(family, changes, number, tmp_path):
    loaded = checkpoint(tmp_path, family, **changes)
    split = [name for name, module in loaded.named_modules() if type(module).__name__ in loaded._no_split_modules]
    assert len(split) == number and {type(loaded.get_submodule(name)).__name__ for name in split} == set(
        loaded._no_split_modules
    )
    for budget in budgets(loaded):
        placed = offloaded(tmp_path, family, device_map="auto", max_memory={"cpu": budget}).hf_device_map
        assert not [key for key in placed for name in split if key.startswith(f"{name}.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_disk_is_saved_whole(family, tmp_path):
    loaded = checkpoint(tmp_path / "first", family)
    model = offloaded(tmp_path / "first", family, device_map="auto", max_memory={"cpu": 0})
    model.save_pretrained(tmp_path / "second")
    again = FAMILIES[family][1].from_pretrained(tmp_path / "second")
    for name, param in loaded.named_parameters():
        assert torch.equal(again.get_parameter(name), param)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_converted_to_another_dtype(family, tmp_path):
    checkpoint(tmp_path, family)
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    loaded = FAMILIES[family][1].from_pretrained(tmp_path, **options).eval()
    model = (
        FAMILIES[family][1].from_pretrained(tmp_path, device_map=experts_device_map(loaded.config), **options).eval()
    )
    assert_same_outputs(model, loaded)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory map of the process from /proc")
def test_only_the_chosen_experts_are_read(tmp_path, monkeypatch):
    config = LstmMoeConfig(
        vocab_size=100, hidden_size=128, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=1024
    )
    model = LstmMoeForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[1].gate.weight)
    model.save_pretrained(tmp_path)
    all_experts = size_of(model.model.layers[1].experts)
    sizes, forward = [], experts_choice.segment_experts_forward

    def resident_of_the_file(*arguments):
        output = forward(*arguments)
        text = Path("/proc/self/smaps").read_text()
        sizes.append(1024 * sum(int(kb) for kb in re.findall(rf"{tmp_path}.*?^Rss:\s+(\d+)", text, re.M | re.S)))
        return output

    monkeypatch.setitem(experts_choice._FORWARDS, "segments", resident_of_the_file)
    model = LstmMoeForCausalLM.from_pretrained(tmp_path, device_map=experts_device_map(config)).eval()
    with torch.no_grad():
        model(torch.tensor([[7]]))
        model(torch.arange(100)[None])
    one_token, many_tokens = sizes
    # Two experts of 1 MB. The system may also map up to 2 MB around each page.
    assert all_experts / 32 <= one_token < all_experts / 3
    assert many_tokens > all_experts * 2 / 3
