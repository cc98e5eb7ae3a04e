"""Balancing over the global batch, of all processes, which is the batch X of the paper (section 3.1).

CV(v)^2 is not linear in the batch, so the losses of the parts do not add up to the loss of the whole. Here the vectors
Importance and Load, which do add up, are summed over the processes before the losses are taken of them, and strictly
balanced gates choose among the tokens of all processes. The models know nothing of it: their gates return these
vectors, and what is done here is done to what they return.

Shape suffixes: T tokens of this process, E experts, M tokens that each expert keeps, W processes.
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
    batch. The M highest of a process are all that can be among the M highest of all, so W * M * E values are sent.
    """
    if not gate.training:
        return type(gate).choose_by_batch(gate, gates_TE, is_token_T1, num_tokens)
    total = torch.zeros((), dtype=torch.long, device=gates_TE.device) + num_tokens
    dist.all_reduce(total, group=group)
    m = tokens_for_each_expert(int(total), gate.num_experts, gate.num_experts_per_tok)
    if m == 0:
        return torch.zeros_like(gates_TE, dtype=torch.bool), None
    gates_TE = gates_TE.masked_fill(~is_token_T1, -1)
    own_ME = gates_TE.new_full((m, gate.num_experts), -1)
    rows = min(m, len(gates_TE))
    own_ME[:rows] = gates_TE.topk(rows, dim=0).values
    parts = [torch.empty_like(own_ME) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own_ME, group=group)
    best_WME = torch.stack(parts)
    last_kept_E = best_WME.flatten(0, 1).topk(m, dim=0).values[-1]
    places_left_E = m - (best_WME > last_kept_E).sum(dim=(0, 1))
    places_left_E -= (best_WME[: dist.get_rank(group)] == last_kept_E).sum(dim=(0, 1))
    equal_TE = gates_TE == last_kept_E
    return (gates_TE > last_kept_E) | (equal_TE & (equal_TE.cumsum(dim=0) <= places_left_E)), None
