"""Behaviour that both families share: Auto classes, saving and loading, refusals, generation, repeatability."""

import pytest
import torch
from tiny_models import GNMT, LM, aligned, assert_same, random_ids, sentences, tiny_lm_config
from transformers import AutoConfig, AutoModel

from moe_hf import LstmMoeForSequenceClassification
from moe_hf.families import LANGUAGE_MODELS, TRANSLATION_MODELS

FAMILIES = {"lm": (LM, LANGUAGE_MODELS), "gnmt": (GNMT, TRANSLATION_MODELS)}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
HIERARCHY = {"num_experts": 8, "num_expert_groups": 4, "num_groups_per_tok": 2, "num_experts_per_tok": 4}
GATES = {
    "default": {},
    "hierarchical": HIERARCHY,
    "strictly balanced": {"gating": "strictly_balanced"},
    "dense": {"gating": "softmax", "num_experts_per_tok": None},
    "softmax": {"gating": "softmax_top_k", "tie_word_embeddings": True},
}
VARIANTS = {
    "lm": GATES
    | {
        "scaled embedding": {"scale_embedding": True, "tie_word_embeddings": True},
        "one lstm": {"layer_pattern": ["lstm"]},
        "four lstms": {"layer_pattern": ["lstm"] * 4},
        "projection": {"layer_pattern": ["lstm", "moe"], "lstm_hidden_size": 12, "dropout": 0.25},
        "two moe layers": {"layer_pattern": ["moe", "lstm", "moe"], "num_expert_layers": 2},
        "two balanced layers": {"layer_pattern": ["moe", "lstm", "moe"], "gating": "strictly_balanced"},
    },
    "gnmt": GATES
    | {
        "tied": {"tie_word_embeddings": True},
        "own embeddings": {"share_embeddings": False},
        "own embeddings, tied": {"share_embeddings": False, "tie_word_embeddings": True},
        "parallel": {"attention_feeding": "parallel", "attention_type": "additive", "lstm_hidden_size": 12},
        "deep output": {"deep_output": True, "tie_word_embeddings": True},
        "one direction": {"encoder_bidirectional_first": False, "label_smoothing": 0.1},
    },
}
CASES = [(family, variant) for family in VARIANTS for variant in VARIANTS[family]]


def inputs_of(family, with_labels=False):
    """Two rows without padding."""
    if family == "lm":
        inputs = {"input_ids": random_ids(2, 4)}
    else:
        source, target = torch.stack(sentences(4, 4)), torch.stack(sentences(3, 3, seed=1))
        inputs = {"input_ids": source, "decoder_input_ids": target}
    return inputs | ({"labels": list(inputs.values())[-1]} if with_labels else {})


def generate(model, rows=3, length=4, **options):
    torch.manual_seed(0)
    ids = torch.stack(sentences(*[length] * rows))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found if model.config.is_encoder_decoder else found[:, length:]


@FAMILY
def test_a_family_is_registered_with_its_auto_classes(family):
    tiny, classes = FAMILIES[family]
    config = AutoConfig.for_model(**tiny.config().to_dict())
    assert type(config) is classes.config_class
    assert type(AutoModel.from_config(config)) is classes.base_class
    for auto_class, head in classes.heads.items():
        assert type(auto_class.from_config(config)) is head


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_saving_and_loading_keeps_config_and_logits(family, variant, tmp_path):
    (tiny, classes), changes, inputs = FAMILIES[family], VARIANTS[family][variant], inputs_of(family)
    model = tiny.model(torch.float32, **changes)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    options = {"experts_implementation": "eager", "output_loading_info": True}
    loaded, info = classes.auto_class.from_pretrained(tmp_path, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not loaded.training
    assert {name: getattr(loaded.config, name) for name in changes} == {
        name: getattr(model.config, name) for name in changes
    }
    assert torch.equal(aligned(loaded)(**inputs).logits, model(**inputs).logits)
    base = aligned(AutoModel.from_pretrained(tmp_path, experts_implementation="eager"))
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_configuration_is_saved_and_loaded_with_every_value(family, variant, tmp_path):
    tiny, classes = FAMILIES[family]
    config = tiny.config(**VARIANTS[family][variant])
    config.save_pretrained(tmp_path)
    assert classes.config_class.from_pretrained(tmp_path).to_dict() == config.to_dict()


@FAMILY
def test_loading_in_bfloat16_and_with_a_device_map(family, tmp_path):
    (tiny, classes), inputs = FAMILIES[family], inputs_of(family)
    model = tiny.model(torch.float32, std=0.3)
    model.save_pretrained(tmp_path)
    half = classes.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    placed = classes.model_class.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert torch.equal(placed(**inputs).logits, half(**inputs).logits)
    expected = model.to(torch.bfloat16).float()(**inputs).logits
    assert_same(half(**inputs).logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 exceeds num_experts=5"),
        ({"gating": "hard"}, "gating='hard'.*noisy_top_k.*strictly_balanced"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_experts": 0, "num_experts_per_tok": 0}, "num_experts=0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size=-1"),
        ({"num_expert_layers": 0}, "num_expert_layers=0"),
        ({"lstm_hidden_size": 0}, "lstm_hidden_size=0"),
        ({"importance_loss_coef": -0.1}, "importance_loss_coef=-0.1 must be finite, and must not be negative"),
        ({"load_loss_coef": -1}, "load_loss_coef=-1"),
        ({"threshold_loss_coef": -0.5}, "threshold_loss_coef=-0.5 must be finite, and must not be negative"),
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
@FAMILY
def test_an_impossible_value_is_refused_by_name(family, changes, message):
    with pytest.raises(Exception, match=message):
        FAMILIES[family][0].config(**changes)


@FAMILY
def test_a_finished_row_does_not_disturb_the_others(family):
    # The weights of this seed make one row end before the others.
    model = FAMILIES[family][0].model(seed=8)
    free = generate(model)
    end = free[0, 3].item()
    stopped = generate(model, eos_token_id=end, pad_token_id=0)
    lengths = []
    for row in range(3):
        new = free[row].tolist()
        lengths.append(new.index(end) + 1 if end in new else len(new))
        assert stopped[row, : lengths[-1]].tolist() == new[: lengths[-1]]
    assert min(lengths) < max(lengths)


@FAMILY
def test_generation_computes_no_balancing_statistics(family):
    model, reports = FAMILIES[family][0].model(), []
    blocks = [module for module in model.modules() if hasattr(module, "gate")]
    assert len(blocks) == (1 if family == "lm" else 2)
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: reports.extend(output[1:]))
    generate(model, num_beams=2)
    assert reports and set(reports) == {None}


@FAMILY
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_and_the_seed_alone_decides_the_loss(family, gate):
    tiny, inputs, losses = FAMILIES[family][0], inputs_of(family, with_labels=True), []
    for seed in (1, 1, 2):
        model = tiny.model(torch.float32, std=0.3, dropout=0.3, **GATES[gate]).train()
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[2].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "gate" in name and name.endswith(".weight"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("head", ["lm", "gnmt", "classifier"])
def test_a_given_output_statistics_wins_over_the_choice_by_labels(head, with_labels, training):
    if head == "classifier":
        model, labels = LstmMoeForSequenceClassification(tiny_lm_config(num_labels=3)), torch.tensor([0, 2])
        inputs = {"attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    else:
        tiny, labels = FAMILIES[head][0], random_ids(2, 5) if head == "gnmt" else random_ids(2, 6)
        model, inputs = tiny.model(), {"decoder_input_ids": labels} if head == "gnmt" else {}
    inputs |= {"input_ids": random_ids(2, 6)} | ({"labels": labels} if with_labels else {})
    model.train(training)
    assert (model(**inputs).aux_loss is not None) is (with_labels or training)
    assert (model(**inputs, output_statistics=None).aux_loss is not None) is (with_labels or training)
    assert model(**inputs, output_statistics=True).aux_loss is not None
    without = model(**inputs, output_statistics=False)
    assert without.aux_loss is None and (without.loss is not None) is with_labels
