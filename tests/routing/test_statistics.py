"""Routing statistics of a text against a slow reference in float64: one token, one expert, one number at a time."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from naive_moe import gate, hierarchical_gate, strictly_balanced_gate
from tiny_models import padded, sentences, tiny_gnmt, tiny_lm

from moe_hf.errors import InputError
from moe_hf.routing import coactivation
from moe_hf.routing.coactivation import PairCounts
from moe_hf.routing.contexts import TopContexts
from moe_hf.routing.observe import moe_layers, routing_totals
from moe_hf.routing.statistics import EXPERTS_KEPT, LayerRouting, collect_routing, side_of

FLAT = {"num_experts": 5, "num_experts_per_tok": 2}
HIERARCHY = {"num_experts": 6, "num_experts_per_tok": 4, "num_expert_groups": 3}
GATES = {
    "noisy top-k": FLAT,
    "hierarchical": HIERARCHY,
    "strictly balanced": {**FLAT, "gating": "strictly_balanced"},
    "dense": {"num_experts": 3, "num_experts_per_tok": None, "gating": "softmax"},
}
CONTEXTS = 3


def positions_of(mask):
    """(B, S) positions in rising order, row by row, -1 for padding."""
    return (mask.reshape(-1).cumsum(0).view_as(mask) - 1).masked_fill(mask == 0, -1)


def lm_batches():
    """Two batches with padding on either side, and positions that go on from one to the next."""
    batches, first = [], 0
    for seed, side in ((0, "right"), (1, "left")):
        ids, mask = padded(sentences(5, 2, 4, seed=seed), 6, side)
        positions = positions_of(mask)
        batches.append(
            (
                {"input_ids": ids, "attention_mask": mask, "use_cache": False},
                {"": positions + first * (positions >= 0)},
            )
        )
        first += int(mask.sum())
    return batches, {"": first}


def gnmt_batches():
    source, source_mask = padded(sentences(4, 6, 1), 6, "right")
    target, target_mask = padded(sentences(3, 5, 2, seed=1), 5, "right")
    inputs = {"input_ids": source, "attention_mask": source_mask, "use_cache": False}
    inputs |= {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
    positions = {"encoder": positions_of(source_mask), "decoder": positions_of(target_mask)}
    return [(inputs, positions)], {"encoder": int(source_mask.sum()), "decoder": int(target_mask.sum())}


def naive_gates(block, tokens, config):
    """{expert: G(x)} of each token, by the equations."""
    weights = {name: weight.detach() for name, weight in block.gate.named_parameters()}
    if config.num_expert_groups is not None:
        per_group = config.num_experts_per_tok // config.num_groups_per_tok
        return hierarchical_gate(tokens, weights, config.num_groups_per_tok, per_group).gates
    if config.gating == "strictly_balanced":
        thresholds = weights["threshold"]
        return strictly_balanced_gate(
            tokens, weights["weight"], thresholds, config.num_experts_per_tok, training=False
        ).gates
    return gate(tokens, weights["weight"], config.num_experts_per_tok).gates


def naive_routing(model, batches):
    """{layer: {position: {expert: G(x)}}}, from the vectors that enter each gate."""
    found = {name: {} for name in moe_layers(model)}
    for inputs, positions in batches:
        entered, hooks = {}, []
        for name, block in moe_layers(model).items():
            keep = lambda module, args, name=name: entered.update({name: args[0]})  # noqa: E731
            hooks.append(block.gate.register_forward_pre_hook(keep))
        with torch.no_grad():
            model.base_model(**inputs)
        for hook in hooks:
            hook.remove()
        for name, block in moe_layers(model).items():
            places = positions[side_of(name)].reshape(-1).tolist()
            tokens = [x for x, place in zip(entered[name], places) if place >= 0]
            gates = naive_gates(block, tokens, model.config)
            found[name] |= dict(zip((place for place in places if place >= 0), gates))
    return found


@pytest.mark.parametrize("family", ["lstm_moe", "gnmt_moe"])
@pytest.mark.parametrize("kind", GATES)
def test_statistics_are_those_of_a_slow_loop(kind, family):
    if family == "lstm_moe":
        model, (batches, lengths) = tiny_lm(**GATES[kind]), lm_batches()
    else:
        model, (batches, lengths) = tiny_gnmt(**GATES[kind]), gnmt_batches()
    if kind == "strictly balanced":  # tokens without experts, with some, and with all
        for block in moe_layers(model).values():
            block.gate.threshold.data.copy_(torch.linspace(0.02, 0.5, 5))
    routing = collect_routing(model, batches, lengths, contexts_size=CONTEXTS)
    naive = naive_routing(model, batches)
    assert list(routing) == list(naive) and len(routing) == (1 if family == "lstm_moe" else 2)
    for name, layer in routing.items():
        check_layer(layer, {place: {e: g.item() for e, g in gates.items()} for place, gates in naive[name].items()})


def check_layer(layer, naive):
    num_experts = layer.num_experts
    assert sorted(naive) == list(range(len(layer.num_used)))
    importance, load = [0.0] * num_experts, [0] * num_experts
    entropies, pairs, places_of = [], Counter(), {e: [] for e in range(num_experts)}
    for place, gates in naive.items():
        best = sorted(gates, key=lambda e: -gates[e])
        assert layer.num_used[place] == len(gates)
        assert layer.experts[place].tolist() == best + [-1] * (layer.experts.shape[1] - len(best))
        assert layer.gates[place][: len(best)].tolist() == pytest.approx([gates[e] for e in best], rel=1e-9)
        entropy = -sum(g * math.log2(g) for g in gates.values())
        assert (
            layer.entropy[place] == pytest.approx(entropy, rel=1e-9, abs=1e-12)
            if gates
            else math.isnan(layer.entropy[place])
        )
        entropies += [entropy] if gates else []
        for e, g in gates.items():
            importance[e] += g
            load[e] += 1
            places_of[e].append((-g, place))
            pairs.update((e, other) for other in gates if e < other)
    assert layer.importance.tolist() == pytest.approx(importance, rel=1e-9)
    assert layer.load.tolist() == load
    for e, places in places_of.items():
        best = sorted(places)[:CONTEXTS]
        assert layer.contexts.positions[e].tolist() == [p for _, p in best] + [-1] * (CONTEXTS - len(best))
        assert layer.contexts.values[e][: len(best)].tolist() == pytest.approx([-g for g, _ in best], rel=1e-9)
    if layer.pairs is None:
        assert all(len(gates) == num_experts for gates in naive.values())
    else:
        first, second, counts = (values.tolist() for values in layer.pairs.pairs())
        assert dict(zip(zip(first, second), counts)) == pairs and layer.pairs.missed == 0

    summary, mean = layer.summary(), sum(load) / num_experts
    assert summary["tokens"] == len(naive)
    assert summary["without_expert"] == sum(not gates for gates in naive.values())
    assert summary["experts_per_token"] == pytest.approx(sum(load) / len(naive))
    assert summary["gate_entropy"] == pytest.approx(sum(entropies) / len(entropies))
    assert summary["max_over_mean_load"] == pytest.approx(max(load) / mean)
    assert summary["cv_load"] == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in load) / num_experts) / mean)
    shares = [value / sum(importance) for value in importance if value > 0]
    assert summary["effective_experts"] == pytest.approx(2 ** -sum(p * math.log2(p) for p in shares))


def test_totals_are_those_of_the_balancing_statistics():
    model, (batches, lengths) = tiny_lm(**HIERARCHY), lm_batches()
    with torch.no_grad(), routing_totals(model) as totals:
        for inputs, _ in batches:
            model.base_model(**inputs, output_statistics=True)
    (layer,) = collect_routing(model, batches, lengths).values()
    np.testing.assert_allclose(layer.importance, totals["layers.1"].importance.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(layer.load, totals["layers.1"].tokens.numpy())


def test_the_model_is_left_as_it_was():
    model, (batches, lengths) = tiny_lm(**FLAT).train(), lm_batches()
    first, second = (collect_routing(model, batches, lengths)["layers.1"].importance for _ in range(2))
    assert model.training and (first == second).all()  # no noise
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_can_be_chosen_and_unknown_ones_are_named():
    model, (batches, lengths) = tiny_gnmt(**FLAT), gnmt_batches()
    assert list(collect_routing(model, batches, lengths, layers=["decoder.layers.1"])) == ["decoder.layers.1"]
    with pytest.raises(
        InputError, match="'layers.7' is not a MoE layer of the model, use one of encoder.layers.2, decoder"
    ):
        collect_routing(model, batches, lengths, layers=["layers.7"])
    with pytest.raises(InputError, match="has no MoE layer"):
        collect_routing(tiny_lm(layer_pattern=["lstm"]), *lm_batches())


def test_only_the_strongest_experts_of_a_token_are_remembered_for_it():
    layer = LayerRouting(EXPERTS_KEPT + 2, num_positions=1)
    weights = torch.linspace(0.19, 0.01, EXPERTS_KEPT + 2, dtype=torch.float64)[None]
    layer.add(torch.arange(EXPERTS_KEPT + 2)[None], weights, torch.tensor([0]))
    assert layer.num_used.tolist() == [EXPERTS_KEPT + 2]
    assert layer.experts.tolist() == [list(range(EXPERTS_KEPT))]
    assert layer.load.tolist() == [1] * (EXPERTS_KEPT + 2)


@pytest.mark.parametrize("seed", range(5))
def test_top_contexts_are_the_first_of_all_sorted_whatever_the_batches(seed):
    random = np.random.default_rng(seed)
    num_slots = 400
    experts, positions = random.integers(0, 7, num_slots), random.permutation(num_slots)
    values = random.choice([0.2, 0.5, 0.9, *random.random(6)], num_slots)  # many are equal
    top = TopContexts(8, size=5)
    for part in np.array_split(np.arange(num_slots), random.integers(1, 40)):
        top.add(experts[part], values[part], positions[part])
    for expert in range(8):
        slots = [(-values[i], positions[i]) for i in range(num_slots) if experts[i] == expert]
        expected = sorted(slots)[:5] + [(0.0, -1)] * (5 - min(5, len(slots)))
        assert list(zip((-top.values[expert]).tolist(), top.positions[expert].tolist())) == expected


def test_pairs_by_chance_are_in_proportion_to_the_loads_and_as_many_as_there_were():
    random = np.random.default_rng(0)
    group_size, num_experts = 3, 9
    rows = np.stack([random.choice(num_experts, 3, replace=False) for _ in range(500)])
    pairs = PairCounts(num_experts, group_size)
    pairs.add(rows, np.full(500, 3))
    load = np.bincount(rows.ravel(), minlength=num_experts)
    first, second = np.triu_indices(num_experts, 1)
    expected = pairs.expected(first, second, load)
    inside = first // group_size == second // group_size
    a, b, counts = pairs.pairs()
    for part, seen in ((inside, a // group_size == b // group_size), (~inside, a // group_size != b // group_size)):
        assert expected[part].sum() == pytest.approx(counts[seen].sum())
        ratio = expected[part] / (load[first] * load[second])[part]
        np.testing.assert_allclose(ratio, ratio[0])


def test_pairs_that_are_forgotten_bound_the_error(monkeypatch):
    monkeypatch.setattr(coactivation, "MERGE_EVERY", 50)
    random = np.random.default_rng(0)
    rows = np.minimum(random.geometric(0.15, (2000, 2)), 30)
    rows = rows[rows[:, 0] != rows[:, 1]]
    exact, bounded = PairCounts(31), PairCounts(31, max_pairs=40)
    for part in np.array_split(rows, 100):
        exact.add(part, np.full(len(part), 2))
        bounded.add(part, np.full(len(part), 2))
    known = {(a, b): count for a, b, count in zip(*bounded.pairs())}
    assert len(known) <= 40 and bounded.missed > 0
    for a, b, count in zip(*exact.pairs()):
        assert known.get((a, b), 0) <= count <= known.get((a, b), 0) + bounded.missed
    assert bounded.num_inside == len(rows) == exact.num_inside
