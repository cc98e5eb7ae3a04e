"""torch.compile compiles the flat models as one graph; torch.export exports a decoding step with its state."""

import copy

import pytest
import torch
from tiny_models import GNMT, LM, assert_same, padded, random_ids, sentences
from transformers import DynamicCache
from transformers.exporters import DynamoConfig, DynamoExporter

pytestmark = pytest.mark.slow
FAMILIES = {"lm": LM, "gnmt": GNMT}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
MODELS = pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("gnmt", {"deep_output": True})],
    ids=[*FAMILIES, "gnmt with a deep output"],
)


def model_and_batch(family, with_padding=True, **changes):
    model = FAMILIES[family].model(**changes)
    model.set_experts_implementation("moe_hf")
    if family == "lm":
        ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
        mask[0, :2] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    else:
        source, mask = padded(sentences(5, 3), 5)
        target, _ = padded(sentences(4, 2, seed=1), 4, value=-100)
        inputs = {"input_ids": source, "attention_mask": mask, "labels": target}
    return model, inputs if with_padding else {name: value for name, value in inputs.items() if "mask" not in name}


@FAMILY
@pytest.mark.parametrize(
    ("with_padding", "changes"),
    [(True, {}), (False, {}), (True, {"num_experts": 8, "num_expert_groups": 4, "num_experts_per_tok": 4})],
    ids=["padded", "full", "hierarchical"],
)
def test_evaluation_is_one_graph(family, with_padding, changes):
    model, inputs = model_and_batch(family, with_padding, **changes)
    torch.compiler.reset()
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        assert_same((output.loss, output.logits), (model(**inputs).loss, model(**inputs).logits))


@FAMILY
def test_a_training_step_is_one_graph(family):
    model, inputs = model_and_batch(family)
    model.train()
    torch.compiler.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        output = forward(**inputs)
        results.append((output.loss, output.aux_loss, *torch.autograd.grad(output.loss, list(model.parameters()))))
    assert_same(*results)


def decoding_step(family, model, num_tokens):
    """The inputs of one more step after `num_tokens`."""
    if family == "lm":
        cache = DynamicCache(config=model.config)
        model(random_ids(2, num_tokens), past_key_values=cache, use_cache=True)
        return {"input_ids": random_ids(2, 1, seed=4), "past_key_values": cache}
    source, mask = padded(sentences(5, 3), 5)
    encoded = model.get_encoder()(input_ids=source, attention_mask=mask)
    inputs = {"encoder_outputs": encoded, "attention_mask": mask}
    output = model(**inputs, decoder_input_ids=random_ids(2, num_tokens), use_cache=True)
    step = {"decoder_input_ids": random_ids(2, 1, seed=4), "past_key_values": output.past_key_values}
    return inputs | step


# Transformers 5.23 reads what torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")
@MODELS
@torch.no_grad()
def test_an_exported_step_goes_on_from_any_state(family, changes):
    model, _ = model_and_batch(family, **changes)
    exported = DynamoExporter().export(model, decoding_step(family, model, 2), config=DynamoConfig())
    inputs = decoding_step(family, model, 5)
    expected = [model(**copy.deepcopy(inputs), use_cache=True)]
    actual = [exported(**copy.deepcopy(inputs))]
    for outputs, step in ((expected, model), (actual, exported)):
        further = {**inputs, "past_key_values": copy.deepcopy(outputs[0].past_key_values)}
        outputs.append(step(**further, **({"use_cache": True} if step is model else {})))
    for output, reference in zip(actual, expected):
        assert_same(output.logits, reference.logits)
        assert output.past_key_values.get_seq_length() == reference.past_key_values.get_seq_length()
