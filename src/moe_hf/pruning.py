"""Makes a model with fewer experts: removes the least-loaded experts, or merges the most similar ones.

Both methods leave m of the n experts of each MoE layer, with their rows of the gate. With a hierarchical gate, m / G
experts stay in each of its G groups. The gate's softmax then runs over the m experts. The load of each expert is
measured on a text in evaluation, separately for each layer (`moe_hf.routing.observe.routing_totals`).

- prune: the m experts with the highest load stay. The result is exact on a text that never uses the other experts.
- merge: each cluster of experts becomes the load-weighted mean of its experts, and of their rows of the gate. Ward's
  criterion chooses the next pair to merge: the pair with the smallest load_a load_b / (load_a + load_b) |E_a - E_b|^2.
  This is the squared change of the weights, weighted by load. Merging pairs hidden unit i of one expert with hidden
  unit i of the other. That suits experts that were copied from one expert; experts that were trained independently
  have no such correspondence. Merging all replicas of an untrained upcycled model restores the original model, if the
  upcycling was exact in evaluation.

With one expert left in each group, the result is flat, and its gate is the old primary gate. Thresholds of strictly
balanced gating now apply to a softmax over fewer experts. They are divided by the kept share of the importance (prune)
or multiplied by n / m (merge). The correction holds on average, not for every token. The cost of a token does not
change, unless num_experts_per_tok is reduced too.
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
    """Return a new model of the same class with fewer experts in every MoE layer; `model` does not change.

    Everything outside the MoE layers is copied, including the generation settings. Optimizer state is not copied.

    Args:
        model: a model of either family, with MoE layers.
        keep: m, the number of experts that a layer keeps; with a hierarchical gate, a multiple of its groups.
        totals: the load of each expert on a text, from `routing_totals(model)`.
        method: "prune" or "merge".
        load: "tokens" (number of tokens of an expert) or "importance" (sum of the expert's gate values).
        num_experts_per_tok: experts per token of the result; by default unchanged.

    Raises:
        InputError: the model has no MoE layers, or `keep` does not fit the model's experts, groups or
            num_experts_per_tok.
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
        # A positive minimum, so that the weighted mean of experts without load exists.
        load_E = getattr(total, load).double()
        load_E = load_E + 1e-6 * load_E.mean().clamp_min(1e-6)
        clusters = _clusters(block, load_E, keep, method)
        means = [(torch.tensor(members), load_E[members] / load_E[members].sum()) for members in clusters]
        for new, old in zip(new_block.experts.parameters(), block.experts.parameters(), strict=True):
            _write_means(new, old, means, dim=new.dim() - 3)
        _write_gate(block.gate, new_block.gate, means, total if method == "prune" else None)

    return with_other_experts(model, changes, write)


def sizes_of_pruned(model: PreTrainedModel, keep: int, num_experts_per_tok: int | None = None) -> dict:
    """Return the values that `prune` changes in the configuration.

    Args:
        model: as for `prune`.
        keep: as for `prune`.
        num_experts_per_tok: as for `prune`.

    Raises:
        InputError: `keep` does not fit the model's experts, groups or num_experts_per_tok.
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
            raise InputError(
                f"keep={keep} is below num_experts_per_tok={k}: keep more, or set num_experts_per_tok lower"
            )
        return changes
    if keep % groups:
        raise InputError(
            f"keep={keep} must be a multiple of num_expert_groups={groups}: each group keeps the same number"
        )
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
    """Return the old experts of each new expert; new experts are in order of group, then of their first old expert."""
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
    """Return (n, n) dot products of the experts' weights, in float64; weights of 32 bits or more are not copied."""
    total = 0
    for weight in experts.parameters():
        for layer in weight.flatten(0, -4) if weight.dim() > 3 else [weight]:
            rows = layer[part].flatten(1)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            total = total + (rows @ rows.T).double().cpu()
    return total


def ward_clusters(products: torch.Tensor, load: torch.Tensor, keep: int) -> list[list[int]]:
    """Merge the two clusters with the smallest load_a load_b / (load_a + load_b) |a - b|^2 until `keep` are left.

    Args:
        products: (n, n), dot products of the vectors; a cluster's vector is the load-weighted mean of its vectors.
        load: (n,), positive.
        keep: number of clusters to leave.

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
    """Set entry e of `new` along `dim` to the weighted mean of old[indices]; means[e] = (indices, weights)."""
    for target, (indices, weights) in zip(new.unbind(dim), means, strict=True):
        rows = old.index_select(dim, indices.to(old.device)).movedim(dim, 0)
        target.copy_(torch.tensordot(weights.to(rows), rows, dims=1))


def _write_gate(old, new, means: list[tuple], pruned: RoutingTotals | None) -> None:
    """Write the kept experts' rows of the gate; `pruned` has the load of all experts if experts are removed."""
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
