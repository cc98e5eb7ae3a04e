"""Models with fewer experts: which experts stay, what happens to the others, and which results are exact."""

import itertools

import pytest
import torch
from tiny_models import assert_same, tiny_lm

from moe_hf.errors import InputError
from moe_hf.pruning import prune, ward_clusters
from moe_hf.routing.observe import routing_totals
from moe_hf.upcycling import moe_blocks, upcycle
from tests.test_upcycling import BALANCED, BUILDERS, DENSE, FLAT, GROUPS, ONE, are_close, build, inputs, logits


@torch.no_grad()
def loads(model, family):
    batch = inputs(family)
    with routing_totals(model.eval()) as totals:
        labels = {"labels": batch.get("decoder_input_ids", batch["input_ids"])}
        model(**batch, **labels)
    return totals


def state(block):
    return dict(block.named_parameters())


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("source", "groups"),
    [
        ({"num_experts": 60, "num_experts_per_tok": 1}, 1),
        ({"num_experts": 60, "num_experts_per_tok": 1, "gating": "softmax_top_k"}, 1),
        ({"num_experts": 90, "num_experts_per_tok": 2, "num_expert_groups": 3}, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no gradient from the task")
def test_pruning_what_the_text_does_not_use_changes_nothing_on_it(source, groups, family):
    model = build(family, source)
    totals = loads(model, family)
    used = max(int((total.tokens.view(groups, -1) > 0).sum(dim=1).max()) for total in totals.values())
    keep = groups * used
    assert groups < keep < source["num_experts"]
    result = prune(model, keep, totals)
    assert result.config.num_experts == keep and moe_blocks(result)[0][1].experts.up_proj.shape[0] == keep
    assert_same(logits(result, family), logits(model, family))
    fewer = prune(model, keep - groups, totals)
    assert not are_close(logits(fewer, family), logits(model, family))


@pytest.mark.parametrize("load", ["tokens", "importance"])
@pytest.mark.parametrize("source", [{"num_experts": 9}, GROUPS | {"num_experts": 15}], ids=["flat", "groups"])
def test_the_most_loaded_stay_in_order_with_their_rows_of_the_gate(source, load):
    model = build("gnmt_moe", source)
    totals = loads(model, "gnmt_moe")
    groups = source.get("num_expert_groups", 1)
    result = prune(model, 6, totals, load=load)
    for (name, old), (_, new) in zip(moe_blocks(model), moe_blocks(result), strict=True):
        values = getattr(totals[name.removeprefix("model.")], load).tolist()
        kept, size = [], len(values) // groups
        for start in range(0, len(values), size):
            by_load = sorted(range(start, start + size), key=lambda i: -values[i])
            kept += sorted(by_load[: 6 // groups])
        for key, weight in state(old).items():
            expected = weight
            if not key.startswith("gate.primary"):
                expected = weight.reshape(len(values), *weight.shape[weight.dim() - (1 if "gate" in key else 2) :])
                expected = expected[kept].view(state(new)[key].shape)
            assert_same(state(new)[key], expected)


# Source, arguments of `upcycle`, num_experts_per_tok that undoes the upcycling.
UNDONE = {
    "copies of one": (ONE, {"num_experts": 5}, 1),
    "copies of one in groups": (ONE, {"num_experts": 6, "num_expert_groups": 3}, None),
    "an expert a group": (FLAT, {"num_experts": 9, "num_expert_groups": 3}, None),
    "all replicas": (FLAT, {"num_experts": 6, "num_experts_per_tok": 4, "gate_std": 0.0}, 2),
    "all replicas, balanced": (BALANCED, {"num_experts": 9, "num_experts_per_tok": 6, "gate_std": 0.0}, 2),
    "all replicas of groups": (GROUPS, {"num_experts": 12, "num_experts_per_tok": 8, "gate_std": 0.0}, 4),
}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", UNDONE)
def test_merging_the_replicas_of_an_untrained_upcycle_gives_its_source_back(name, family):
    source, arguments, k = UNDONE[name]
    model = build(family, source)
    larger = upcycle(model, **arguments)
    keep = 3 if name == "copies of one in groups" else source["num_experts"]
    result = prune(larger, keep, loads(larger, family), method="merge", num_experts_per_tok=k)
    assert_same(logits(result, family), logits(model, family))
    if name != "copies of one in groups":  # three copies behind one flat gate
        assert result.config.to_dict() | {"dtype": None} == model.config.to_dict()
    if source is not ONE:
        for key, weight in model.named_parameters():
            assert_same(dict(result.named_parameters())[key], weight)


def test_merged_experts_are_load_weighted_means_with_their_rows_of_the_gate():
    model = build("lstm_moe", {"num_experts": 6})
    totals = loads(model, "lstm_moe")
    (total,) = totals.values()
    (_, old), (_, new) = *moe_blocks(model), *moe_blocks(prune(model, 5, totals, method="merge"))
    vectors = torch.cat([old.experts.up_proj.flatten(1), old.experts.down_proj.flatten(1)], dim=1)
    tokens = total.tokens
    cost = {
        (a, b): tokens[a] * tokens[b] / (tokens[a] + tokens[b]) * (vectors[a] - vectors[b]).square().sum()
        for a, b in itertools.combinations(range(6), 2)
        if tokens[a] + tokens[b] > 0
    }
    a, b = min(cost, key=cost.get)
    assert tokens[a] > 0 and tokens[b] > 0 and tokens[a] != tokens[b]
    for key, weight in state(old).items():
        expected = weight.clone()
        expected[a] = (tokens[a] * weight[a] + tokens[b] * weight[b]) / (tokens[a] + tokens[b])
        torch.testing.assert_close(state(new)[key], torch.cat([expected[:b], expected[b + 1 :]]), rtol=1e-5, atol=1e-5)


def test_clusters_are_wards_of_the_vectors_themselves():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    load = torch.rand(12, dtype=torch.float64, generator=generator) + 0.01
    clusters = [[i] for i in range(12)]

    def cost(pair):
        means, loads = [], []
        for members in pair:
            loads.append(load[members].sum())
            means.append((load[members, None] * vectors[members]).sum(dim=0) / loads[-1])
        return loads[0] * loads[1] / sum(loads) * (means[0] - means[1]).square().sum()

    for keep in range(11, 0, -1):
        a, b = min(itertools.combinations(clusters, 2), key=cost)
        clusters = [members for members in clusters if members not in (a, b)] + [sorted(a + b)]
        assert sorted(ward_clusters(vectors @ vectors.T, load, keep)) == sorted(clusters)


def test_thresholds_grow_by_what_the_softmax_lost():
    model = build("lstm_moe", BALANCED | {"num_experts": 6})
    totals = loads(model, "lstm_moe")
    (total,) = totals.values()
    kept = total.importance.topk(4).indices
    (_, pruned), (_, merged) = (
        moe_blocks(prune(model, 4, totals, method=method, load="importance"))[0] for method in ("prune", "merge")
    )
    expected = float(total.importance.sum() / total.importance[kept].sum()) / 6
    assert_same(pruned.gate.threshold, torch.full((4,), expected, dtype=torch.float64))
    assert_same(merged.gate.threshold, torch.full((4,), 1 / 4, dtype=torch.float64))


@pytest.mark.parametrize("method", ["prune", "merge"])
@pytest.mark.parametrize(
    "source", [{"num_experts_per_tok": 2, "num_expert_layers": 2}, {"gating": "softmax", "num_experts_per_tok": 5}]
)
def test_deep_experts_and_dense_gates_go_too(source, method):
    model = build("lstm_moe", {"num_experts": 5} | source)
    result = prune(model, 3, loads(model, "lstm_moe"), method=method)
    assert result.config.num_experts_per_tok == (3 if "gating" in source else 2)
    assert logits(result, "lstm_moe").isfinite().all()


@pytest.mark.parametrize(
    ("source", "arguments", "named"),
    [
        ({"layer_pattern": ["lstm"]}, {"keep": 2}, "no 'moe' layer"),
        (FLAT, {"keep": 3}, "keep=3 must lie between 1 and 2, as the model has num_experts=3"),
        (FLAT, {"keep": 0}, "keep=0 must lie between"),
        (FLAT, {"keep": 1}, "keep=1 is below num_experts_per_tok=2"),
        (GROUPS, {"keep": 5}, "keep=5 must be a multiple of num_expert_groups=3"),
        (GROUPS | {"num_experts": 9}, {"keep": 6, "num_experts_per_tok": 5}, "num_experts_per_tok=5 must be a mult"),
        (GROUPS, {"keep": 3, "num_experts_per_tok": 4}, "keep=3 leaves 1 experts in a group: num_experts_per_tok=4"),
        (DENSE, {"keep": 2, "num_experts_per_tok": 1}, "num_experts_per_tok=1 must be num_experts=2"),
        (FLAT, {"keep": 2, "num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
        (FLAT, {"keep": 2, "method": "drop"}, "method='drop' must be one of prune, merge"),
        (FLAT, {"keep": 2, "load": "size"}, "load='size' must be one of tokens, importance"),
        (FLAT, {"keep": 2, "totals": {}}, r"totals=\[\] has no loads of layers.1"),
    ],
)
def test_what_does_not_fit_is_one_line(source, arguments, named):
    model = tiny_lm(**source)
    arguments = {"totals": loads(model, "lstm_moe")} | arguments
    with pytest.raises(InputError, match=named) as error:
        prune(model, **arguments)
    assert "\n" not in str(error.value)
