"""Makes a model with many experts from a trained model with one or a few; at first, both compute the same function.

A MoE layer computes y = sum_i G_i(x) E_i(x), with E_i(x) = W_down,i act(W_up,i x), and applies a sigmoid to y. Each of
the n old experts becomes c s new experts: c replicas, each cut into s slices of the hidden units. W_down of a slice is
multiplied by s, so that E_i = 1/s sum_j E_ij.

The new layer equals the old layer for a token if each slice j of expert i gets the weight G_i / s, summed over the
replicas. The cases:

- One expert (n = 1, such as MoE-1-Wide), copies: the weights sum to 1, so sum_r G_r E = E for any gate.
- One expert, slices: the s slices of a replica share one row of the gate, so their logits tie. K is a multiple of s,
  so a token gets whole replicas, with equal weights for all slices of a replica ("virtual groups", He et al., 2024).
- n experts, slices: each expert's row of the gate is repeated s times. With K = s k, a token gets all slices of the
  same k experts as before, with the weight G_i / s each.
- n experts, num_expert_groups = n: a hierarchical gate. The old gate becomes the primary gate, and each old expert
  becomes a group. Each group chooses among its copies or slices as in the cases of one expert. The result is
  y = sum_i G_i(x) E_i(x) for any c.
- n experts, replicas without such groups: new row = row i of the old gate + row of replica r, the same for all i. This
  is exact for a token if the best replica's logit leads by more than the difference between the best experts' logits.
  Then the k best experts of that replica are chosen, and the replica's logit cancels in the softmax. For other tokens
  it is an approximation. If all replicas are chosen (K = c s k, gate_std = 0), it is exact.

In training, each expert has its own gating noise, which separates the slices. The cases above are then exact only in
evaluation. The exceptions are copies of one expert, and copies in groups. `exactness` returns which case applies.

Upcycling by copies follows Komatsuzaki et al. (2022, arXiv 2212.05055), and virtual groups follow He et al. (2024,
arXiv 2410.07524). Neither is in the paper of Shazeer et al.

Letters: n old and N new experts, k and K experts per token, h hidden size of an old expert, c replicas, s slices.
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
    """Return a new model of the same class with more experts in every MoE layer; `model` does not change.

    Everything outside the MoE layers is copied, including the generation settings. Optimizer state cannot be
    converted: continue the training with a new optimizer.

    Args:
        model: a model of either family, with MoE layers; num_experts=1 is a dense model.
        num_experts: N, a multiple of n * s.
        slices: s; an expert of the result has h / s hidden units.
        num_experts_per_tok: K. None: s k, which keeps the cost of a token, but at least 2 for each new gate. A gate
            that chooses one expert always gives it weight 1, and so cannot learn.
        num_expert_groups: number of groups of a hierarchical gate. For n = 1, any number; for n experts behind a flat
            gate, n, so that each expert becomes a group. None: flat for n = 1, otherwise the source's value.
        num_groups_per_tok: only for n = 1 with groups; by default 2. Otherwise the source's gate determines it.
        gating: only for n = 1; by default the source's.
        gate_std: standard deviation of the random rows that distinguish replicas in the gate, measured on their logits
            for an input of unit variance. With 0, all replicas tie until noise or training separates them.
        expert_std: standard deviation of noise on the new experts' weights, relative to the standard deviation of each
            matrix. A value other than 0 changes the function. Replicas that are always chosen together stay equal
            without such noise.
        seed: seed of the gate's rows and the experts' noise.

    Raises:
        InputError: the model has no MoE layers, or the sizes do not fit.
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
    """Return how close the result of `upcycle` is to its source: EXACT, EXACT_IN_EVALUATION or APPROXIMATE.

    EXACT means equal up to rounding, also in training (with the same noise and dropout).

    Args:
        old (MoeConfig): configuration of the source.
        new (MoeConfig): configuration of the result.
        gate_std: the value passed to `upcycle`.
        expert_std: the value passed to `upcycle`.
    """
    n, slices = old.num_experts, old.moe_intermediate_size // new.moe_intermediate_size
    copies = new.num_experts // (n * slices)
    is_noisy = new.gating == "noisy_top_k"
    if expert_std:
        return APPROXIMATE
    if new.gating == "softmax":
        return EXACT
    if n == 1:
        if new.gating == "strictly_balanced":  # in training, some tokens get no expert
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
    """Return a model with `changes` in its configuration; `write_block` fills its MoE layers, the rest is copied.

    The function needs the memory of both models, plus one gate or the experts that are merged into one.

    Args:
        model: the source.
        changes: {argument of the configuration: value}.
        write_block (Callable): called with a MoE layer's name, the old block and the new block, whose parameters are
            uninitialised.

    Raises:
        InputError: the configuration does not allow the changes, or a weight of the result is not finite.
    """
    try:
        config = type(model.config).from_dict(model.config.to_dict() | changes)
        check_memory(config)
        with torch.device("meta"):  # no random initialisation
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
    """Return the MoE layers of a model with their names.

    Raises:
        InputError: the model has no MoE layers.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, MoeBlock)]
    if not blocks:
        patterns = [f"{name}={value}" for name, value in vars(model.config).items() if name.endswith("layer_pattern")]
        raise InputError(f"the model has no 'moe' layer: {', '.join(patterns)}")
    return blocks


def _sizes(config, num_experts, slices, num_experts_per_tok, **gate_arguments) -> dict:
    """Return the changes of the configuration; refuse sizes that do not fit."""
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
                f"of an expert in each of num_groups_per_tok={num_choices} groups"
            )
        return changes | {"num_experts_per_tok": num_experts_per_tok}
    is_dense = changes["gating"] == "softmax"
    return changes | {"num_experts_per_tok": num_experts if is_dense else num_choices * per_choice}


def _gate_of_one_expert(config, slices, num_expert_groups, num_groups_per_tok, gating) -> tuple[dict, int, int]:
    """Return the changes for a new gate, the number of gates that choose experts for a token, and their default k."""
    if config.gating == "strictly_balanced":
        raise InputError(
            "gating='strictly_balanced' is not supported for num_experts=1: the threshold of one expert has no effect"
        )
    changes = {"gating": gating or config.gating, "num_expert_groups": num_expert_groups}
    if num_expert_groups is None:
        if num_groups_per_tok is not None:
            raise InputError(f"num_groups_per_tok={num_groups_per_tok} needs num_expert_groups as well")
        return changes, 1, max(2, slices)
    taken = min(2, num_expert_groups) if num_groups_per_tok is None else num_groups_per_tok
    return changes | {"num_groups_per_tok": taken}, max(1, taken), max(2, slices)


def _gate_of_many_experts(config, slices, num_expert_groups, num_groups_per_tok, gating) -> tuple[dict, int, int]:
    """Return the same values as `_gate_of_one_expert` for a gate that is made from the old gate."""
    n, k, groups = config.num_experts, config.num_experts_per_tok, config.num_expert_groups
    for name, value in (("gating", gating), ("num_groups_per_tok", num_groups_per_tok)):
        if value is not None:
            raise InputError(
                f"{name}={value!r} is only for a model with num_experts=1, but the model has num_experts={n}"
            )
    if num_expert_groups in (None, groups):
        taken = 1 if groups is None else config.num_groups_per_tok
        return {"gating": config.gating}, taken, slices * k // taken
    if groups is not None or num_expert_groups != n or config.gating not in ("noisy_top_k", "softmax_top_k"):
        raise InputError(
            f"num_expert_groups={num_expert_groups} must be {n} (one group for each expert) or left out; "
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
    """Write the old gate's rows for replicas and slices; start from zeros for one expert and in new groups."""
    becomes_primary = not is_fresh and isinstance(new, HierarchicalGate) and not isinstance(old, HierarchicalGate)
    *groups, _, width = new.weight.shape
    zeros = new.weight.new_zeros(*groups, 1, width)
    has_rows = not is_fresh and not becomes_primary
    _write_rows(new.weight, old.weight if has_rows else zeros, slices, gate_std, generator)
    if hasattr(new, "noise_weight"):
        _write_rows(new.noise_weight, old.noise_weight if has_rows else zeros, slices)
    if hasattr(new, "threshold"):
        parts = len(new.threshold) // len(old.weight)
        # At least one replica with average logits passes. All parts of an old expert pass if the expert passed before.
        new.threshold.copy_(torch.ones(parts) / parts if is_fresh else old.threshold.repeat_interleave(parts) / parts)
    if isinstance(new, HierarchicalGate):
        source = old if becomes_primary else getattr(old, "primary", None)
        for name, weight in new.primary.named_parameters():
            rows = None if is_fresh else getattr(source, name, None)  # a gate without noise has no noise_weight
            weight.zero_() if rows is None else weight.copy_(rows)


def _write_rows(
    target: torch.Tensor, rows: torch.Tensor, slices: int, std: float = 0.0, generator: torch.Generator | None = None
) -> None:
    """Write rows (..., m, D) to `target` (..., m * c * s, D): row i, plus a random row per replica if c > 1."""
    *lead, m, width = rows.shape
    target = target.view(*lead, m, -1, slices, width)
    copies = target.shape[-3]
    rows = rows[..., None, None, :]
    if copies > 1 and std:
        of_replica = torch.randn(*lead, 1, copies, 1, width, generator=generator) * (std * width**-0.5)
        rows = rows + of_replica.to(rows)
    target.copy_(rows)
