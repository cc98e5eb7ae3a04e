"""Balances experts over the global batch of all processes, which is the batch X of the paper (section 3.1).

CV(v)^2 is not linear in the batch, so the balancing losses of the processes do not add up to the loss of the global
batch. The vectors Importance and Load do add up. This module sums both vectors over the processes before the losses
are computed, and lets strictly balanced gates choose among the tokens of all processes. It changes the gates' outputs
from outside, so the model code does not depend on it.

Shape suffixes: T tokens of this process, E experts, M the number of tokens that each expert keeps (at most T), W
processes, C candidates.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from ..models.balanced_gating import StrictlyBalancedGate, tokens_for_each_expert
from ..models.gating import GateOutput, NoisyTopKGate, SoftmaxTopKGate
from ..models.hierarchical_gating import HierarchicalGate

# The primary gate of a hierarchical gate is itself in this list, as it must be: Load_H is the product of the primary
# load, which is then summed over all processes, and each process's part of the secondary loads.
GATES = (NoisyTopKGate, SoftmaxTopKGate, StrictlyBalancedGate, HierarchicalGate)

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
BITS_AT_ONCE = 4  # more bits mean fewer but larger exchanges of a strictly balanced gate


class GlobalBatchCallback(TrainerCallback):
    """Balances the experts over the global batch of all processes during a training."""

    def __init__(self):
        self._undo = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove()
        self._undo = balance_over_global_batch(model)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove()

    def _remove(self):
        for undo in self._undo:
            undo()
        self._undo = []


def balance_over_global_batch(model: nn.Module, group: dist.ProcessGroup | None = None) -> list:
    """Make every gate of `model` balance over the global batch of a group's processes, in training mode.

    Every process must then run the same number of forward passes. The balancing losses are equal on all processes.
    Their gradients equal those of a single process with the global batch, whose tokens are ordered by rank, under two
    conditions: the weights of the processes' losses add up to 1 (as with `num_items_in_batch`), and the gradients are
    summed.

    Args:
        group: the processes; None: all.

    Returns:
        functions that undo the change.
    """
    undo = []
    for module in model.modules():
        if isinstance(module, GATES):
            undo.append(module.register_forward_hook(partial(_sum_statistics, group)).remove)
        if isinstance(module, StrictlyBalancedGate):
            # An attribute of the instance overrides the method of the class.
            module.choose_by_batch = partial(_choose_by_global_batch, module, group)
            undo.append(partial(delattr, module, "choose_by_batch"))
    return undo


def _sum_statistics(group, gate: nn.Module, inputs: tuple, output: GateOutput) -> GateOutput | None:
    """Sum importance, load and token counts over the processes, and average the threshold loss over all tokens."""
    if not gate.training or output.importance is None:
        return None
    own = [output.importance, output.load, output.tokens_per_expert]
    if output.threshold_loss is not None:
        num_tokens = _num_tokens(*inputs).to(output.threshold_loss.dtype)
        own += [output.threshold_loss[None] * num_tokens, num_tokens]
    total = _SumOverProcesses.apply(torch.cat(own), group)
    importance, load, counts, *rest = total.split([len(part) for part in own])
    output = output._replace(importance=importance, load=load, tokens_per_expert=counts.detach())
    if rest:
        output = output._replace(threshold_loss=(rest[0] / rest[1].clamp_min(1))[0])
    return output


class _SumOverProcesses(torch.autograd.Function):
    """Sums a tensor over the processes, for every process. The gradient of a part is the sum of all their gradients.

    torch has deprecated its version (torch.distributed.nn.functional). The replacement is only differentiable in newer
    versions.
    """

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _SumOverProcesses.apply(grad.contiguous(), ctx.group), None


def _num_tokens(hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_statistics=True) -> torch.Tensor:
    """Return the number of real tokens (1,) from the arguments of a gate."""
    if mask is None:
        return torch.tensor([len(hidden_states)], device=hidden_states.device)
    return mask.sum()[None]


@torch.no_grad()
def _choose_by_global_batch(
    gate: StrictlyBalancedGate,
    group,
    gates_TE: torch.Tensor,
    is_token_T1: torch.Tensor,
    num_tokens: int | torch.Tensor,
) -> tuple[torch.Tensor, int | None]:
    """Replace `StrictlyBalancedGate.choose_by_batch`: each expert keeps the best tokens of all processes.

    Among equal values, tokens of lower ranks come first, then earlier tokens, which is the order of the global batch.
    The processes exchange only counts, a few per expert, for any number of tokens and processes.
    """
    if not gate.training:
        return type(gate).choose_by_batch(gate, gates_TE, is_token_T1, num_tokens)
    total = torch.zeros((), dtype=torch.long, device=gates_TE.device) + num_tokens
    dist.all_reduce(total, group=group)
    m = tokens_for_each_expert(int(total), gate.num_experts, gate.num_experts_per_tok)
    if m == 0:
        return torch.zeros_like(gates_TE, dtype=torch.bool), None
    # The bits of non-negative floats, read as integers, have the same order. Padding is negative and comes first.
    keys_TE = gates_TE.masked_fill(~is_token_T1, -1).view(INTEGERS[gates_TE.dtype])
    best_EM = keys_TE.topk(min(m, len(keys_TE)), dim=0).values.flip(0).t().contiguous().long()
    last_kept_E = _highest_with(m, best_EM, 8 * keys_TE.element_size() - 2, group)
    num_above_E, num_from_E = (_count_from(best_EM, last_kept_E[:, None] + more)[:, 0] for more in (1, 0))
    own_2E = torch.stack([num_above_E, num_from_E - num_above_E])
    counts = [torch.empty_like(own_2E) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own_2E, group=group)
    above_WE, equal_WE = torch.stack(counts).unbind(1)
    places_left_E = m - above_WE.sum(dim=0) - equal_WE[: dist.get_rank(group)].sum(dim=0)
    equal_TE = keys_TE == last_kept_E
    return (keys_TE > last_kept_E) | (equal_TE & (equal_TE.cumsum(dim=0) <= places_left_E)), None


def _highest_with(m: int, sorted_EM: torch.Tensor, num_bits: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return (E,), the highest keys that `m` tokens of all processes reach, determined from high to low bits.

    Args:
        m: number of tokens of each expert.
        sorted_EM: keys of this process in ascending order: the highest `m`, or all.
        num_bits: number of bits of a key that may be set. A gate's value is at most 1, so its two highest bits are 0.
        group: the processes.
    """
    found_E = torch.zeros(len(sorted_EM), dtype=torch.int64, device=sorted_EM.device)
    while num_bits:
        step = min(BITS_AT_ONCE, num_bits)
        num_bits -= step
        digits = torch.arange(1, 2**step, device=sorted_EM.device)
        counts = _count_from(sorted_EM, found_E[:, None] + (digits << num_bits))
        dist.all_reduce(counts, group=group)
        found_E += (counts >= m).sum(dim=-1) << num_bits
    return found_E


def _count_from(sorted_EM: torch.Tensor, keys_EC: torch.Tensor) -> torch.Tensor:
    """Return (E, C), the number of an expert's keys that are at least each of the C candidates."""
    return sorted_EM.shape[1] - torch.searchsorted(sorted_EM, keys_EC, out_int32=True)
