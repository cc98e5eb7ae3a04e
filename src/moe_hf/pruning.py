"""A model with fewer experts from one with many: the least-loaded are left out, or the most similar are merged.

Both leave m of the n experts of each MoE layer, with their rows of the gate; behind a hierarchical gate m / G in each
of its G groups. The gate's softmax is over these from then on. Loads are those on a text, in evaluation
(`moe_hf.routing.observe.routing_totals`), and each layer has its own.

- prune: the m most loaded experts stay. Exact on a text whose tokens choose none of the others.
- merge: clusters of experts become their load-weighted means, and so do their rows of the gate. Ward's criterion names
  the pair to merge next: that with the least load_a load_b / (load_a + load_b) * |E_a - E_b|^2, the squared change of
  the weights, weighed by load. Hidden unit 5 of one expert is taken for that of the other, as in experts that were
  copied from one; experts that were trained apart have nothing in common that could be averaged. Merging all replicas
  of an untrained upcycle undoes it, where that was exact in evaluation.

With one expert left in each group the result is flat: its gate is the primary one. The thresholds of strictly balanced
gating meet a softmax over fewer experts; they are divided by the kept part of the importance (prune), or multiplied by
n / m (merge). That is right on average, not for every token. A token costs as much as before, unless
num_experts_per_tok is made smaller too.
"""

import torch
from transformers import PreTrainedModel

from .errors import InputError
from .models.hierarchical_gating import HierarchicalGate
from .routing.observe import RoutingTotals
from .upcycling import moe_blocks, with_other_experts

METHODS = ("prune", "merge")
LOADS = ("tokens", "importance")


def prune(
    model: PreTrainedModel,
    keep: int,
    totals: dict[str, RoutingTotals],
    *,
    method: str = "prune",
    load: str = "tokens",
    num_experts_per_tok: int | None = None,
) -> PreTrainedModel:
    """A new model of the same class with fewer experts in every MoE layer; `model` is left as it is.

    Everything but the MoE layers is copied, the generation settings too, the state of an optimizer is not.

    Args:
        model: of either family, with MoE layers.
        keep: m, the experts of a layer that stay; with a hierarchical gate a multiple of its groups.
        totals: what each expert got from a text, by `routing_totals(model)`.
        method: "prune" or "merge".
        load: "tokens" (how many an expert gets) or "importance" (the sum of their gate values).
        num_experts_per_tok: of the result; by default as it was.

    Raises:
        InputError: the model has no MoE layers, or `keep` does not fit its experts, its groups or num_experts_per_tok.
    """
    for name, value, allowed in (("method", method, METHODS), ("load", load, LOADS)):
        if value not in allowed:
            raise InputError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    changes = sizes_of_pruned(model, keep, num_experts_per_tok)
    names = {name: name.removeprefix("model.") for name, _ in moe_blocks(model)}
    missing = [name for name in names.values() if name not in totals]
    if missing:
        raise InputError(f"totals={sorted(totals)} has no loads of {missing[0]}")

    def write(name, block, new_block) -> None:
        total = totals[names[name]]
        # Never 0, so that the mean of experts without load exists.
        load_E = getattr(total, load).double()
        load_E = load_E + 1e-6 * load_E.mean().clamp_min(1e-6)
        clusters = _clusters(block, load_E, keep, method)
        means = [(torch.tensor(members), load_E[members] / load_E[members].sum()) for members in clusters]
        for new, old in zip(new_block.experts.parameters(), block.experts.parameters(), strict=True):
            _write_means(new, old, means, dim=new.dim() - 3)
        _write_gate(block.gate, new_block.gate, means, total if method == "prune" else None)

    return with_other_experts(model, changes, write)


def sizes_of_pruned(model: PreTrainedModel, keep: int, num_experts_per_tok: int | None = None) -> dict:
    """What `prune` changes in the configuration.

    Args:
        model: as for `prune`.
        keep: as for `prune`.
        num_experts_per_tok: as for `prune`.

    Raises:
        InputError: sizes that do not fit.
    """
    config = model.config
    moe_blocks(model)
    n, groups = config.num_experts, config.num_expert_groups
    if not 1 <= keep < n:
        raise InputError(f"keep={keep} must lie between 1 and {n - 1}, as the model has num_experts={n}")
    k = keep if config.gating == "softmax" else config.num_experts_per_tok
    k = k if num_experts_per_tok is None else num_experts_per_tok
    changes = {"num_experts": keep, "num_experts_per_tok": k}
    if groups is None:
        if k > keep:
            raise InputError(f"keep={keep} is below num_experts_per_tok={k}: keep more, or give a smaller one")
        return changes
    if keep % groups:
        raise InputError(f"keep={keep} must be a multiple of num_expert_groups={groups}: as many in each group")
    taken, per_group = config.num_groups_per_tok, keep // groups
    if per_group == 1 and num_experts_per_tok is None:
        changes["num_experts_per_tok"] = k = taken
    if k % taken or k > taken * per_group:
        raise InputError(
            f"keep={keep} leaves {per_group} experts in a group: num_experts_per_tok={k} must be a multiple of "
            f"num_groups_per_tok={taken} and at most {taken * per_group}"
        )
    return changes | ({"num_expert_groups": None} if per_group == 1 else {})


def _clusters(block, load_E: torch.Tensor, keep: int, method: str) -> list[list[int]]:
    """The old experts of each new one, in the order of the new ones: by group, then by the first of them."""
    num_groups = len(block.gate.weight) if isinstance(block.gate, HierarchicalGate) else 1
    size, keep = len(load_E) // num_groups, keep // num_groups
    clusters = []
    for start in range(0, len(load_E), size):
        load = load_E[start : start + size]
        if method == "prune":
            found = [[i] for i in load.argsort(descending=True, stable=True)[:keep].tolist()]
        else:
            found = ward_clusters(_products(block.experts, slice(start, start + size)), load, keep)
        clusters += sorted([start + i for i in members] for members in found)
    return clusters


def _products(experts, part: slice) -> torch.Tensor:
    """(n, n) scalar products of the experts' weights, in float64; no copy of weights of 32 bits or more is made."""
    total = 0
    for weight in experts.parameters():
        for layer in weight.flatten(0, -4) if weight.dim() > 3 else [weight]:
            rows = layer[part].flatten(1)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            total = total + (rows @ rows.T).double().cpu()
    return total


def ward_clusters(products: torch.Tensor, load: torch.Tensor, keep: int) -> list[list[int]]:
    """Merge the pair of clusters whose load_a load_b / (load_a + load_b) * |a - b|^2 is least until `keep` are left.

    Args:
        products: (n, n), scalar products of the vectors; a cluster's vector is the load-weighted mean.
        load: (n,), positive.
        keep: clusters that are left.

    Returns:
        the members of each cluster, each list sorted.
    """
    products, load = products.clone(), load.clone()
    members = {i: [i] for i in range(len(load))}

    def costs_of(a):
        square = products.diagonal()
        distance = (square[a] + square - 2 * products[a]).clamp_min(0)
        return load[a] * load / (load[a] + load) * distance

    costs = torch.stack([costs_of(a) for a in range(len(load))]).fill_diagonal_(torch.inf)
    is_gone = torch.zeros(len(load), dtype=torch.bool)
    while len(members) > keep:
        a, b = sorted(divmod(int(costs.argmin()), len(load)))
        weight = load[a] / (load[a] + load[b])
        products[a] = weight * products[a] + (1 - weight) * products[b]
        products[:, a] = weight * products[:, a] + (1 - weight) * products[:, b]
        load[a] += load[b]
        members[a] = sorted(members[a] + members.pop(b))
        is_gone[b] = True
        costs[b] = costs[:, b] = torch.inf
        costs[a] = costs[:, a] = costs_of(a).masked_fill(is_gone, torch.inf)
        costs[a, a] = torch.inf
    return list(members.values())


def _write_means(new: torch.Tensor, old: torch.Tensor, means: list[tuple], dim: int = 0) -> None:
    """Entry e of `new` along `dim` is the mean of old[indices], weighed; means[e] = (indices, weights)."""
    for target, (indices, weights) in zip(new.unbind(dim), means, strict=True):
        rows = old.index_select(dim, indices.to(old.device)).movedim(dim, 0)
        target.copy_(torch.tensordot(weights.to(rows), rows, dims=1))


def _write_gate(old, new, means: list[tuple], pruned: RoutingTotals | None) -> None:
    """Rows of the kept experts; `pruned`: what all experts got, when the others are left out."""
    if isinstance(old, HierarchicalGate):
        is_flat = not isinstance(new, HierarchicalGate)
        for name, weight in (new if is_flat else new.primary).named_parameters():
            weight.copy_(getattr(old.primary, name))
        if is_flat:
            return
    for name in ("weight", "noise_weight"):
        if hasattr(new, name):
            _write_means(getattr(new, name).flatten(0, -2), getattr(old, name).flatten(0, -2), means)
    if hasattr(new, "threshold"):
        _write_means(new.threshold, old.threshold, means)
        if pruned is None:
            new.threshold.mul_(len(old.threshold) / len(new.threshold))
        else:
            kept = torch.cat([indices for indices, _ in means])
            new.threshold.mul_(float(pruned.importance.sum() / pruned.importance[kept].sum()))
