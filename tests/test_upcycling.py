"""Models with more experts: which of them compute the source's function, in evaluation and in training."""

import pytest
import torch
from tiny_models import padded, random_ids, sentences, tiny_gnmt, tiny_lm

from moe_hf.errors import InputError
from moe_hf.models.balanced_gating import StrictlyBalancedGate
from moe_hf.upcycling import APPROXIMATE, EXACT, EXACT_IN_EVALUATION, exactness, moe_blocks, upcycle

BUILDERS = {"lstm_moe": tiny_lm, "gnmt_moe": tiny_gnmt}
ONE = {"num_experts": 1, "num_experts_per_tok": 1}
FLAT = {"num_experts": 3, "num_experts_per_tok": 2}
NOISELESS = FLAT | {"gating": "softmax_top_k"}
BALANCED = FLAT | {"gating": "strictly_balanced"}
DENSE = {"num_experts": 3, "num_experts_per_tok": 3, "gating": "softmax"}
GROUPS = {"num_experts": 6, "num_experts_per_tok": 4, "num_expert_groups": 3, "num_groups_per_tok": 2}
# Source, arguments of `upcycle`, num_experts_per_tok of the result, tolerance.
SCHEMES = {
    "copies": (ONE, {"num_experts": 6}, 2, EXACT),
    "copies, three of them": (ONE, {"num_experts": 6, "num_experts_per_tok": 3}, 3, EXACT),
    "copies, no noise": (ONE, {"num_experts": 6, "gating": "softmax_top_k"}, 2, EXACT),
    "copies, all of them": (ONE, {"num_experts": 6, "gating": "softmax"}, 6, EXACT),
    "copies in groups": (ONE, {"num_experts": 6, "num_expert_groups": 3}, 4, EXACT),
    "copies of a deep expert": (ONE | {"num_expert_layers": 3}, {"num_experts": 4}, 2, EXACT),
    "copies, balanced": (
        ONE,
        {"num_experts": 6, "num_experts_per_tok": 1, "gating": "strictly_balanced"},
        1,
        EXACT_IN_EVALUATION,
    ),
    "slices": (ONE, {"num_experts": 12, "slices": 4}, 4, EXACT_IN_EVALUATION),
    "slices of two replicas": (
        ONE,
        {"num_experts": 12, "slices": 2, "num_experts_per_tok": 4},
        4,
        EXACT_IN_EVALUATION,
    ),
    "slices, no noise": (ONE, {"num_experts": 12, "slices": 4, "gating": "softmax_top_k"}, 4, EXACT),
    "slices, all of them": (ONE, {"num_experts": 12, "slices": 4, "gating": "softmax"}, 12, EXACT),
    "slices, balanced": (
        ONE,
        {"num_experts": 12, "slices": 4, "gating": "strictly_balanced"},
        4,
        EXACT_IN_EVALUATION,
    ),
    "slices in groups": (ONE, {"num_experts": 12, "slices": 2, "num_expert_groups": 3}, 4, EXACT_IN_EVALUATION),
    "flat: slices": (FLAT, {"num_experts": 6, "slices": 2}, 4, EXACT_IN_EVALUATION),
    "flat: slices, no noise": (NOISELESS, {"num_experts": 6, "slices": 2}, 4, EXACT),
    "flat: slices, balanced": (BALANCED, {"num_experts": 6, "slices": 2}, 4, EXACT),
    "flat: an expert a group": (FLAT, {"num_experts": 6, "num_expert_groups": 3}, 4, EXACT),
    "flat: an expert a group, slices": (
        FLAT,
        {"num_experts": 12, "slices": 2, "num_expert_groups": 3},
        4,
        EXACT_IN_EVALUATION,
    ),
    "flat: an expert a group, no noise": (
        NOISELESS,
        {"num_experts": 6, "num_expert_groups": 3},
        4,
        EXACT_IN_EVALUATION,
    ),
    "flat: all replicas": (
        FLAT,
        {"num_experts": 6, "num_experts_per_tok": 4, "gate_std": 0.0},
        4,
        EXACT_IN_EVALUATION,
    ),
    "flat: all replicas, no noise": (
        NOISELESS,
        {"num_experts": 6, "num_experts_per_tok": 4, "gate_std": 0.0},
        4,
        EXACT,
    ),
    "flat: all replicas, balanced": (
        BALANCED,
        {"num_experts": 6, "num_experts_per_tok": 4, "gate_std": 0.0},
        4,
        EXACT,
    ),
    "flat: equal replicas, balanced": (BALANCED, {"num_experts": 6, "gate_std": 0.0}, 2, EXACT_IN_EVALUATION),
    "flat: replicas": (FLAT, {"num_experts": 6}, 2, APPROXIMATE),
    "flat: replicas, balanced": (BALANCED, {"num_experts": 6}, 2, APPROXIMATE),
    "dense gating: replicas and slices": (DENSE, {"num_experts": 12, "slices": 2}, 12, EXACT),
    "hierarchical: slices": (GROUPS, {"num_experts": 12, "slices": 2}, 4 * 2, EXACT_IN_EVALUATION),
    "hierarchical: replicas": (GROUPS, {"num_experts": 12}, 4, APPROXIMATE),
    "noise on the experts": (ONE, {"num_experts": 6, "expert_std": 0.1}, 2, APPROXIMATE),
}


def build(family, source):
    model = BUILDERS[family](**source)
    for module in model.modules():
        if isinstance(module, StrictlyBalancedGate):  # all weights are drawn from one wide distribution there
            module.threshold.data.fill_(1 / module.num_experts)
    return model


def inputs(family):
    if family == "lstm_moe":
        return {"input_ids": random_ids(3, 9)}
    ids, mask = padded(sentences(5, 2, 4), 6)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": random_ids(3, 7)}


@torch.no_grad()
def logits(model, family):
    return model.eval()(**inputs(family)).logits


@torch.no_grad()
def outputs_in_training(model, hidden_states):
    outputs = []
    for _, block in moe_blocks(model.train()):
        torch.manual_seed(1)
        outputs.append(block(hidden_states)[0])
    return torch.stack(outputs)


def are_close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_as_close_to_its_source_as_it_says(name, family):
    source, arguments, k, expected = SCHEMES[name]
    model = build(family, source)
    result = upcycle(model, **arguments)
    assert type(result) is type(model) and result.dtype == torch.float64
    assert (result.config.num_experts, result.config.num_experts_per_tok) == (arguments["num_experts"], k)
    noise = {name: arguments[name] for name in ("gate_std", "expert_std") if name in arguments}
    assert exactness(model.config, result.config, **noise) == expected
    assert are_close(logits(result, family), logits(model, family)) == (expected != APPROXIMATE)
    x = torch.randn(1, 60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same = are_close(outputs_in_training(result, x), outputs_in_training(model, x))
    assert same == (expected == EXACT)


def test_noise_on_the_choice_of_slices_is_unbiased():
    model = build("lstm_moe", ONE)
    result = upcycle(model, 12, slices=4).train()
    (_, old), (_, new) = *moe_blocks(model), *moe_blocks(result)
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(20_000, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = new.mix_experts(x, new.gate(x, None, False))
        expected = old.mix_experts(x[:1], old.gate(x[:1], None, False))[0]
    error = (outputs.mean(dim=0) - expected) / (outputs.std(dim=0) / len(x) ** 0.5)
    assert outputs.std(dim=0).min() > 0 and error.abs().max() < 4


def test_replicas_far_apart_in_the_gate_keep_the_function_of_nearly_every_token():
    model = build("lstm_moe", FLAT)
    x = torch.randn(1, 500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = []
    with torch.no_grad():
        expected = moe_blocks(model)[0][1](x)[0]
        for gate_std in (0.0, 1.0, 1000.0):
            actual = moe_blocks(upcycle(model, 9, gate_std=gate_std).eval())[0][1](x)[0]
            kept.append(torch.isclose(actual, expected).all(dim=-1).double().mean().item())
    assert kept[0] < 0.01 and kept[0] < kept[1] < 0.9 and kept[2] > 0.98


@pytest.mark.parametrize("family", BUILDERS)
def test_the_source_is_left_as_it_was_and_shares_nothing(family):
    model = BUILDERS[family](num_experts=1, num_experts_per_tok=1, tie_word_embeddings=True)
    model.generation_config.max_length = 77
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    result = upcycle(model, 4, slices=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.generation_config.max_length == 77 and not result.training
    assert result.lm_head.weight is result.get_input_embeddings().weight
    with torch.no_grad():
        for weight in result.parameters():
            weight.zero_()
    assert model.config.num_experts == 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["copies", "slices", "slices in groups", "flat: an expert a group"])
def test_the_task_teaches_every_new_gate(name):
    source, arguments, *_ = SCHEMES[name]
    model = build("lstm_moe", source | {"importance_loss_coef": 0, "load_loss_coef": 0})
    result = upcycle(model, **arguments, expert_std=0.1)  # a choice between equal experts teaches nothing
    torch.manual_seed(0)
    result.train()(**inputs("lstm_moe"), labels=inputs("lstm_moe")["input_ids"]).loss.backward()
    gates = {name: weight.grad.abs().max() for name, weight in result.named_parameters() if ".gate." in name}
    assert len(gates) >= 2 and min(gates.values()) > 1e-6, gates


def test_noise_on_the_experts_is_a_part_of_their_size():
    model = tiny_lm(moe_intermediate_size=400, **ONE)
    (_, old), (_, new) = *moe_blocks(model), *moe_blocks(upcycle(model, 3, expert_std=0.1))
    for name in ("up_proj", "down_proj"):
        weight, noisy = getattr(old.experts, name), getattr(new.experts, name)
        ratio = (noisy - weight).std(dim=(1, 2)) / weight.std()
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1), rtol=0.06, atol=0)
        assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize(
    ("source", "arguments", "named"),
    [
        ({"layer_pattern": ["lstm"]}, {"num_experts": 4}, r"no 'moe' layer: layer_pattern=\['lstm'\]"),
        (ONE, {"num_experts": 1}, "num_experts=1 must be a multiple of 1 .* above 1"),
        (ONE, {"num_experts": 6, "slices": 4}, r"=6 must be a multiple of 4 \(num_experts=1 \* slices=4\)"),
        (FLAT, {"num_experts": 8}, "num_experts=8 must be a multiple of 3"),
        (ONE, {"num_experts": 6, "slices": 3}, "slices=3 must divide moe_intermediate_size=8"),
        (
            ONE | {"num_expert_layers": 2},
            {"num_experts": 4, "slices": 2},
            "slices=2 must be 1 for .*num_expert_layers=2",
        ),
        (ONE, {"num_experts": 8, "slices": 4, "num_experts_per_tok": 6}, "num_experts_per_tok=6 must be a multiple"),
        (ONE, {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds num_experts=4"),
        (ONE, {"num_experts": 4, "num_expert_groups": 3}, "num_expert_groups=3 does not divide num_experts=4"),
        (ONE, {"num_experts": 4, "num_expert_groups": 0}, "=0 must be at least 1"),
        (ONE, {"num_experts": 4, "num_groups_per_tok": 2}, "num_groups_per_tok=2 needs num_expert_groups as well"),
        (ONE, {"num_experts": 4, "gating": "best"}, "gating='best' is not known"),
        (ONE, {"num_experts": 4, "gate_std": -1.0}, "gate_std=-1.0 must not be negative"),
        (ONE | {"gating": "strictly_balanced"}, {"num_experts": 4}, "the threshold of one expert has no effect"),
        (FLAT, {"num_experts": 6, "num_expert_groups": 2}, "num_expert_groups=2 must be 3 .one group for each"),
        (GROUPS, {"num_experts": 12, "num_expert_groups": 6}, "num_expert_groups=6 .* the model has .*groups=3"),
        (FLAT, {"num_experts": 6, "gating": "softmax_top_k"}, "gating='softmax_top_k' is only for a model with"),
        (GROUPS, {"num_experts": 12, "num_groups_per_tok": 3}, "num_groups_per_tok=3 is only for a model with"),
    ],
)
def test_what_does_not_fit_is_one_line(source, arguments, named):
    with pytest.raises(InputError, match=named) as error:
        upcycle(tiny_lm(**source), **arguments)
    assert "\n" not in str(error.value)
