"""A model with many experts from a trained one with one or a few, which computes the same function at its start.

A MoE layer puts y = sum_i G_i(x) E_i(x), with E_i(x) = W_down,i act(W_up,i x), through a sigmoid. Each of its n
experts becomes c s new ones: c replicas, each cut into s slices of its hidden units, whose W_down is multiplied by s,
so that E_i = 1/s sum_j E_ij. The new layer is the old one for every token at which the weights that it gives to slice
j of expert i, summed over the replicas, are G_i / s for each j:

- One expert (n = 1, such as MoE-1-Wide), copies: the weights sum to 1, so sum_r G_r E = E, for any gate.
- One expert, slices: the s slices of a replica have the same row in the gate. They tie, so that a choice of K, a
  multiple of s, takes whole replicas, all slices of one with the same weight ("virtual groups", He et al., 2024).
- n experts, slices: each expert's row is repeated s times. Of K = s k all slices of the same k experts are taken, with
  G_i / s each.
- n experts, num_expert_groups = n: a hierarchical gate. The old gate is the primary one, each old expert a group, in
  which copies or slices are chosen as those of one expert are. y = sum_i G_i(x) (E_i(x)) for any c.
- n experts, replicas without such groups: row i of the gate plus a row of replica r, the same for all i. Where one
  replica's logit leads by more than the best experts' differ, the k best of that replica are taken, and its logit
  cancels in the softmax; elsewhere this is an approximation. All replicas taken (K = c s k, gate_std = 0) are exact.

While training, each expert draws noise of its own, which tears slices apart: then these are exact in evaluation alone,
but for copies of one expert or in groups. `exactness` tells. Upcycling to copies is Komatsuzaki et al.'s (2022, arXiv
2212.05055), virtual groups are He et al.'s (2024, arXiv 2410.07524); neither is in the paper.

Letters: n old and N new experts, k and K of them for a token, h hidden size of an old expert, c replicas, s slices.
"""

import copy

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from .errors import InputError, first_line
from .loading import check_finite
from .model_size import check_memory
from .models.hierarchical_gating import HierarchicalGate
from .models.moe import MoeBlock

EXACT, EXACT_IN_EVALUATION, APPROXIMATE = "exact", "exact in evaluation", "approximate"


def upcycle(
    model: PreTrainedModel,
    num_experts: int,
    *,
    slices: int = 1,
    num_experts_per_tok: int | None = None,
    num_expert_groups: int | None = None,
    num_groups_per_tok: int | None = None,
    gating: str | None = None,
    gate_std: float = 1.0,
    expert_std: float = 0.0,
    seed: int = 0,
) -> PreTrainedModel:
    """A new model of the same class with more experts, all MoE layers alike; `model` is left as it is.

    Everything but the MoE layers is copied, the generation settings too. The state of an optimizer has no counterpart:
    train on with a new one.

    Args:
        model: of either family, with MoE layers; num_experts=1 is a dense model.
        num_experts: N, a multiple of n * s.
        slices: s; an expert of the result has h / s hidden units.
        num_experts_per_tok: K. None: s k, the operations of the source, but at least 2 for each new gate: a choice of
            one has weight 1, which teaches the gate nothing.
        num_expert_groups: of a hierarchical gate. For n = 1 any; for n experts behind a flat gate n: each becomes a
            group. None: flat for n = 1, else as it was.
        num_groups_per_tok: for n = 1 with groups; by default 2. Otherwise the source decides.
        gating: for n = 1; by default the source's.
        gate_std: standard deviation of what tells replicas apart in the gate: of their logits, for an input of unit
            variance. With 0 all replicas tie until noise or training parts them.
        expert_std: standard deviation of noise on the new experts' weights, as a part of each matrix's own. Anything
            but 0 changes the function; replicas that are always chosen together need it to become different.
        seed: of both.

    Raises:
        InputError: the model has no MoE layers, or sizes do not fit.
    """
    moe_blocks(model)
    changes = _sizes(
        model.config,
        num_experts,
        slices,
        num_experts_per_tok,
        num_expert_groups=num_expert_groups,
        num_groups_per_tok=num_groups_per_tok,
        gating=gating,
    )
    for name, value in (("gate_std", gate_std), ("expert_std", expert_std)):
        if value < 0:
            raise InputError(f"{name}={value} must not be negative")
    generator, is_fresh = torch.Generator().manual_seed(seed), model.config.num_experts == 1

    def write(name: str, block: MoeBlock, new_block: MoeBlock) -> None:
        _write_experts(block.experts, new_block.experts, slices, expert_std, generator)
        _write_gate(block.gate, new_block.gate, is_fresh, slices, gate_std, generator)

    return with_other_experts(model, changes, write)


def exactness(old, new, gate_std: float = 1.0, expert_std: float = 0.0) -> str:
    """How close the result of `upcycle` is to its source: EXACT, EXACT_IN_EVALUATION or APPROXIMATE.

    "exact" means up to rounding, while training too (for the same noise and dropout).

    Args:
        old (MoeConfig): configuration of the source.
        new (MoeConfig): configuration of the result.
        gate_std: as `upcycle` got it.
        expert_std: as `upcycle` got it.
    """
    n, slices = old.num_experts, old.moe_intermediate_size // new.moe_intermediate_size
    copies = new.num_experts // (n * slices)
    is_noisy = new.gating == "noisy_top_k"
    if expert_std:
        return APPROXIMATE
    if new.gating == "softmax":
        return EXACT
    if n == 1:
        if new.gating == "strictly_balanced":  # while training some tokens have no expert
            return EXACT_IN_EVALUATION
        return EXACT_IN_EVALUATION if is_noisy and slices > 1 else EXACT
    if new.num_expert_groups != old.num_expert_groups:
        return EXACT if slices == 1 and old.gating == new.gating else EXACT_IN_EVALUATION
    if copies > 1 and gate_std:
        return APPROXIMATE
    if new.num_experts_per_tok == copies * slices * old.num_experts_per_tok:
        return EXACT_IN_EVALUATION if is_noisy else EXACT
    return EXACT_IN_EVALUATION if new.gating == "strictly_balanced" else APPROXIMATE


def with_other_experts(model: PreTrainedModel, changes: dict, write_block) -> PreTrainedModel:
    """A model with `changes` in its configuration; its MoE layers are filled by `write_block`, the rest is copied.

    Needs the memory of both models, and little besides: a gate, or the experts that are merged into one.

    Args:
        model: the source.
        changes: {argument of the configuration: value}.
        write_block (Callable): is called with a MoE layer's name, the old block and the new one, whose parameters hold
            no values.

    Raises:
        InputError: the configuration does not allow the changes, or a weight of the result is not finite.
    """
    try:
        config = type(model.config).from_dict(model.config.to_dict() | changes)
        check_memory(config)
        with torch.device("meta"):  # nothing is drawn at random
            result = type(model)._from_config(
                config, dtype=model.dtype, experts_implementation=model.config._experts_implementation
            )
    except (ValueError, StrictDataclassError) as error:
        raise InputError(first_line(error)) from error
    result.to_empty(device=model.device)
    result.tie_weights()
    blocks, weights = dict(moe_blocks(model)), dict(model.named_parameters())
    with torch.no_grad():
        for name, block in moe_blocks(result):
            write_block(name, blocks[name], block)
        inside = tuple(f"{name}." for name in blocks)
        for name, weight in result.named_parameters():
            if not name.startswith(inside):
                weight.copy_(weights[name])
    if hasattr(model, "generation_config"):
        result.generation_config = copy.deepcopy(model.generation_config)
    check_finite(result)  # a dtype of 16 bits may overflow
    return result.train(model.training)


def moe_blocks(model: PreTrainedModel) -> list[tuple[str, MoeBlock]]:
    """The MoE layers of a model with their names.

    Raises:
        InputError: there are none.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, MoeBlock)]
    if not blocks:
        patterns = [f"{name}={value}" for name, value in vars(model.config).items() if name.endswith("layer_pattern")]
        raise InputError(f"the model has no 'moe' layer: {', '.join(patterns)}")
    return blocks


def _sizes(config, num_experts, slices, num_experts_per_tok, **gate_arguments) -> dict:
    """What changes in the configuration; refuses sizes that do not fit."""
    n, h = config.num_experts, config.moe_intermediate_size
    if slices < 1 or h % slices:
        raise InputError(f"slices={slices} must divide moe_intermediate_size={h}")
    if slices > 1 and config.num_expert_layers > 1:
        raise InputError(f"slices={slices} must be 1 for experts with num_expert_layers={config.num_expert_layers}")
    if num_experts <= n or num_experts % (n * slices):
        raise InputError(
            f"num_experts={num_experts} must be a multiple of {n * slices} (num_experts={n} * slices={slices})"
            f" above {n}"
        )
    sizes_of_gate = _gate_of_one_expert if n == 1 else _gate_of_many_experts
    changes, num_choices, per_choice = sizes_of_gate(config, slices, **gate_arguments)
    changes |= {"num_experts": num_experts, "moe_intermediate_size": h // slices}
    if num_experts_per_tok is not None:
        multiple = num_choices * slices
        if changes["gating"] in ("noisy_top_k", "softmax_top_k") and num_experts_per_tok % multiple:
            raise InputError(
                f"num_experts_per_tok={num_experts_per_tok} must be a multiple of {multiple}: all slices={slices} "
                f"of an expert, in num_groups_per_tok={num_choices} groups"
            )
        return changes | {"num_experts_per_tok": num_experts_per_tok}
    is_dense = changes["gating"] == "softmax"
    return changes | {"num_experts_per_tok": num_experts if is_dense else num_choices * per_choice}


def _gate_of_one_expert(config, slices, num_expert_groups, num_groups_per_tok, gating) -> tuple[dict, int, int]:
    """Changes for a new gate, how many gates choose experts for a token, and how many each by default."""
    if config.gating == "strictly_balanced":
        raise InputError("gating='strictly_balanced' of a model with num_experts=1: its threshold decides nothing")
    changes = {"gating": gating or config.gating, "num_expert_groups": num_expert_groups}
    if num_expert_groups is None:
        return changes, 1, max(2, slices)
    taken = min(2, num_expert_groups) if num_groups_per_tok is None else num_groups_per_tok
    return changes | {"num_groups_per_tok": taken}, max(1, taken), max(2, slices)


def _gate_of_many_experts(config, slices, num_expert_groups, num_groups_per_tok, gating) -> tuple[dict, int, int]:
    """The same for a gate that is made from the old one."""
    n, k, groups = config.num_experts, config.num_experts_per_tok, config.num_expert_groups
    for name, value in (("gating", gating), ("num_groups_per_tok", num_groups_per_tok)):
        if value is not None:
            raise InputError(f"{name}={value!r} is for a model with one expert; here the gate of the {n} decides")
    if num_expert_groups in (None, groups):
        taken = 1 if groups is None else config.num_groups_per_tok
        return {"gating": config.gating}, taken, slices * k // taken
    if groups is not None or num_expert_groups != n or config.gating not in ("noisy_top_k", "softmax_top_k"):
        raise InputError(
            f"num_expert_groups={num_expert_groups} must be {n}, a group for each expert of a flat gate, or left out; "
            f"the model has num_expert_groups={groups}, gating={config.gating!r}"
        )
    changes = {"gating": "noisy_top_k", "num_expert_groups": n, "num_groups_per_tok": k}
    return changes, k, max(2, slices)


def _write_experts(old, new, slices: int, expert_std: float, generator: torch.Generator) -> None:
    """Expert (i * c + r) * s + j of `new` is slice j of replica r of expert i of `old`."""
    up = old.up_proj.unflatten(1, (slices, -1))  # (n, s, h / s, D)
    down = old.down_proj.unflatten(2, (slices, -1)).transpose(1, 2)  # (n, s, D, h / s)
    for weight, parts in ((new.up_proj, up), (new.down_proj, down)):
        weight.view(len(parts), -1, *parts.shape[1:]).copy_(parts[:, None])
    new.down_proj.mul_(slices)
    if old.mid_proj is not None:
        layers, n, *shape = old.mid_proj.shape
        new.mid_proj.view(layers, n, -1, *shape).copy_(old.mid_proj[:, :, None])
    if expert_std:
        for weight in new.parameters():
            for matrix in weight.flatten(0, -3):
                noise = torch.randn(matrix.shape, generator=generator)
                matrix.add_(noise.to(matrix) * (expert_std * matrix.std()))


def _write_gate(old, new, is_fresh: bool, slices: int, gate_std: float, generator: torch.Generator) -> None:
    """The old gate's rows for its experts' replicas and slices; for one expert and in new groups rows of zeros."""
    becomes_primary = not is_fresh and isinstance(new, HierarchicalGate) and not isinstance(old, HierarchicalGate)
    *groups, _, width = new.weight.shape
    zeros = new.weight.new_zeros(*groups, 1, width)
    has_rows = not is_fresh and not becomes_primary
    _write_rows(new.weight, old.weight if has_rows else zeros, slices, gate_std, generator)
    if hasattr(new, "noise_weight"):
        _write_rows(new.noise_weight, old.noise_weight if has_rows else zeros, slices)
    if hasattr(new, "threshold"):
        parts = len(new.threshold) // len(old.weight)
        # One replica of average logits then passes at least; of old experts, all parts of those that passed before.
        new.threshold.copy_(torch.ones(parts) / parts if is_fresh else old.threshold.repeat_interleave(parts) / parts)
    if isinstance(new, HierarchicalGate):
        source = old if becomes_primary else getattr(old, "primary", None)
        for name, weight in new.primary.named_parameters():
            rows = None if is_fresh else getattr(source, name, None)  # a gate without noise has no noise_weight
            weight.zero_() if rows is None else weight.copy_(rows)


def _write_rows(
    target: torch.Tensor, rows: torch.Tensor, slices: int, std: float = 0.0, generator: torch.Generator | None = None
) -> None:
    """Rows (..., m, D) -> `target` (..., m * c * s, D): row i, plus a random row of replica r if there are several."""
    *lead, m, width = rows.shape
    target = target.view(*lead, m, -1, slices, width)
    copies = target.shape[-3]
    rows = rows[..., None, None, :]
    if copies > 1 and std:
        of_replica = torch.randn(*lead, 1, copies, 1, width, generator=generator) * (std * width**-0.5)
        rows = rows + of_replica.to(rows)
    target.copy_(rows)
