"""Balancing over the global batch, of all processes, which is the batch X of the paper (section 3.1).

CV(v)^2 is not linear in the batch, so the losses of the parts do not add up to the loss of the whole. Here the vectors
Importance and Load, which do add up, are summed over the processes before the losses are taken of them, and strictly
balanced gates choose among the tokens of all processes. The models know nothing of it: their gates return these
vectors, and what is done here is done to what they return.

Shape suffixes: T tokens of this process, E experts, M tokens that each expert keeps, or T if those are fewer, W
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

# A hierarchical gate's primary gate is one of these too, and has to be: Load_H is the product of the primary load,
# which is then of all processes, and of what each process adds to the secondary ones.
GATES = (NoisyTopKGate, SoftmaxTopKGate, StrictlyBalancedGate, HierarchicalGate)

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
BITS_AT_ONCE = 4  # the more, the fewer and the longer are the exchanges of a strictly balanced gate


class GlobalBatchCallback(TrainerCallback):
    """Balances the experts over the global batch of all processes while a model trains."""

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
    """Make every gate of `model` balance over the global batch of a group's processes, while it is in training mode.

    Every process must then run the same number of forward passes. On all of them the balancing losses are equal, and
    their gradients are those of one process with the global batch, in its tokens' order by rank, if the processes'
    losses are weighed so that the weights add up to 1 (as `num_items_in_batch` does) and the gradients are summed.

    Args:
        group: the processes; None: all.

    Returns:
        functions that take it back.
    """
    undo = []
    for module in model.modules():
        if isinstance(module, GATES):
            undo.append(module.register_forward_hook(partial(_sum_statistics, group)).remove)
        if isinstance(module, StrictlyBalancedGate):
            # The instance's attribute hides the class's method.
            module.choose_by_batch = partial(_choose_by_global_batch, module, group)
            undo.append(partial(delattr, module, "choose_by_batch"))
    return undo


def _sum_statistics(group, gate: nn.Module, inputs: tuple, output: GateOutput) -> GateOutput | None:
    """Importance, load and token counts summed over the processes; the threshold loss as a mean over all tokens."""
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
    """A sum that every process gets; so the gradient with respect to a part is the sum of what all of them pass back.

    torch has deprecated its own (torch.distributed.nn.functional) for one that only newer versions differentiate.
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
    """The arguments of a gate -> its real tokens, (1,)."""
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
    """In place of `StrictlyBalancedGate.choose_by_batch`: each expert keeps the best tokens of all processes.

    Among equal values those of the lower rank are kept, and of one rank the earlier ones: the order of the global
    batch. What is exchanged are numbers of tokens, a few for each expert, however many tokens and processes there are.
    """
    if not gate.training:
        return type(gate).choose_by_batch(gate, gates_TE, is_token_T1, num_tokens)
    total = torch.zeros((), dtype=torch.long, device=gates_TE.device) + num_tokens
    dist.all_reduce(total, group=group)
    m = tokens_for_each_expert(int(total), gate.num_experts, gate.num_experts_per_tok)
    if m == 0:
        return torch.zeros_like(gates_TE, dtype=torch.bool), None
    # Read as integers, values that are not negative keep their order; padding, which is negative, comes before them.
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
    """(E,) the highest keys that `m` tokens of all processes reach, found from the highest bits to the lowest.

    Args:
        m: tokens for each expert.
        sorted_EM: keys of this process, ascending: the highest `m`, or all.
        num_bits: of a key that may be set; a gate's value is at most 1, so that its two highest bits are not.
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
    """(E, C) how many of an expert's keys are as high as each of C, or higher."""
    return sorted_EM.shape[1] - torch.searchsorted(sorted_EM, keys_EC, out_int32=True)
