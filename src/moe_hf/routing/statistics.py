"""Collects routing statistics of a model's gates, in one pass over a text.

Shape suffixes: B batch, S sequence, T = B * S tokens, E experts, K experts per token, P positions of the text.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..models.balancing import cv_squared, importance, tokens_per_expert
from ..models.gating import GateOutput
from .coactivation import PairCounts
from .contexts import TopContexts
from .observe import load_statistics, moe_layers, observe_gates

# Number of strongest experts stored for each token; a strictly balanced or dense gate may choose more.
EXPERTS_KEPT = 8


class LayerRouting:
    """The routing of one MoE layer over a text of P positions, collected batch by batch.

    Memory: about 80 bytes per position, and 16 * `contexts_size` bytes per expert; `pairs` has a separate limit.

    Attributes:
        importance: (E,) float64, the sum of gate values (equation 6).
        load: (E,) int64, the number of tokens.
        experts: (P, EXPERTS_KEPT) int32, the experts of each position, the highest gate value first; -1 if unused.
        gates: (P, EXPERTS_KEPT) float64, the gate values G(x)_i of these experts; 0 if unused.
        num_used: (P,) int32, the number of experts of each position; -1 for a position that was not read.
        entropy: (P,) float64, the entropy of the gate values in bits; NaN for a position without experts.
        contexts: a `TopContexts`.
        pairs: a `PairCounts`; None for a dense gate, which pairs all experts.
    """

    def __init__(
        self,
        num_experts: int,
        num_positions: int,
        contexts_size: int = 32,
        group_size: int | None = None,
        is_dense: bool = False,
    ):
        self.num_experts, self.group_size = num_experts, group_size
        self.importance, self.load = np.zeros(num_experts), np.zeros(num_experts, dtype=np.int64)
        self.experts = np.full((num_positions, min(EXPERTS_KEPT, num_experts)), -1, dtype=np.int32)
        self.gates = np.zeros(self.experts.shape)
        self.num_used = np.full(num_positions, -1, dtype=np.int32)
        self.entropy = np.full(num_positions, np.nan)
        self.contexts = TopContexts(num_experts, contexts_size)
        self.pairs = None if is_dense else PairCounts(num_experts, group_size)

    def add(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, positions: torch.Tensor) -> None:
        """Add one batch.

        Args:
            top_k_index: (T, K), the experts from the gate, the highest weight first.
            top_k_weights: (T, K), the weights of these experts.
            positions: (T,), the position of each token in the text, each at most once; -1 for padding.
        """
        is_token = (positions >= 0).to(top_k_index.device)
        index_TK, weights_TK = top_k_index[is_token].cpu(), top_k_weights[is_token].detach().double().cpu()
        self.importance += importance(index_TK, weights_TK, self.num_experts).numpy()
        self.load += tokens_per_expert(index_TK, weights_TK, self.num_experts).long().numpy()

        index, gates, places = index_TK.numpy(), weights_TK.numpy(), positions[positions >= 0].cpu().numpy()
        used = gates > 0
        self.num_used[places] = num_used = used.sum(axis=1)
        logs = np.log2(gates, out=np.zeros_like(gates), where=used)
        self.entropy[places] = np.where(num_used > 0, -(gates * logs).sum(axis=1), np.nan)
        width = min(index.shape[1], self.experts.shape[1])
        self.experts[places, :width] = np.where(used, index, -1)[:, :width]
        self.gates[places, :width] = gates[:, :width]
        token, _ = used.nonzero()
        self.contexts.add(index[used], gates[used], places[token])
        if self.pairs is not None:
            self.pairs.add(index, num_used)

    def summary(self) -> dict[str, float]:
        """Return statistics over the whole text.

        - tokens: the number of tokens.
        - without_expert: the number of tokens without an expert.
        - experts_per_token: the mean number of experts per token.
        - cv_importance, cv_load, max_over_mean_load, dead_experts: the balance of the experts.
        - gate_entropy: the mean entropy of tokens with experts, in bits.
        - effective_experts: 2 to the power of the entropy of the experts' importance; E in perfect balance.
        """
        read = self.num_used >= 0
        share = self.importance[self.importance > 0] / max(self.importance.sum(), np.finfo(float).tiny)
        has_experts = self.num_used > 0
        return {
            "tokens": int(read.sum()),
            "without_expert": int((self.num_used == 0).sum()),
            "experts_per_token": float(self.num_used[read].mean()) if read.any() else 0.0,
            "cv_importance": cv_squared(torch.from_numpy(self.importance)).sqrt().item(),
            **(load_statistics(torch.from_numpy(self.load).double()) if self.load.any() else {}),
            "gate_entropy": float(self.entropy[has_experts].mean()) if has_experts.any() else 0.0,
            "effective_experts": float(2 ** -(share * np.log2(share)).sum()) if len(share) else 0.0,
        }


@torch.no_grad()
def collect_routing(
    model: nn.Module,
    batches: Iterable[tuple[dict, dict[str, torch.Tensor]]],
    num_positions: dict[str, int],
    layers: list[str] | None = None,
    contexts_size: int = 32,
) -> dict[str, LayerRouting]:
    """Run a model over a text, without noise, and record the routing of its gates.

    Args:
        model: a model of either family; it is in evaluation mode during the run.
        batches: pairs of the model's arguments (without softmax), and {side: positions (B, S) of the batch's tokens in
            that side's text}, -1 for padding. The side is "" in a language model, "encoder" or "decoder" in a
            translation model.
        num_positions: {side: P}.
        layers: names of MoE layers; None for all.
        contexts_size: number of places kept for each expert.

    Returns:
        {name of the layer, such as "layers.1" or "encoder.layers.1": its routing}.

    Raises:
        InputError: the model has no MoE layers, or a name in `layers` is not known.
    """
    config = model.config
    group_size = None if config.num_expert_groups is None else config.num_experts // config.num_expert_groups
    is_dense = config.gating != "strictly_balanced" and config.num_experts_per_tok == config.num_experts
    routing = {
        name: LayerRouting(config.num_experts, num_positions[side_of(name)], contexts_size, group_size, is_dense)
        for name in choose_layers(model, layers)
    }
    current: dict[str, torch.Tensor] = {}

    def observe(name: str, output: GateOutput) -> None:
        if name in routing:
            routing[name].add(output.top_k_index, output.top_k_weights, current[side_of(name)].reshape(-1))

    was_training = model.training
    model.eval()
    try:
        with observe_gates(model, observe):
            for inputs, positions in batches:
                current.update(positions)
                model.base_model(**inputs)
    finally:
        model.train(was_training)
    return routing


def choose_layers(model: nn.Module, layers: list[str] | None) -> list[str]:
    """Return the names of the chosen MoE layers of `model`.

    Args:
        model: a model of either family.
        layers: the names; None for all.

    Raises:
        InputError: the model has no MoE layers, or a name in `layers` is not known.
    """
    known = list(moe_layers(model))
    if not known:
        raise InputError(f"model={model.config.name_or_path or type(model).__name__} has no MoE layer to report on")
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise InputError(f"layers: {unknown[0]!r} is not a MoE layer of the model, use one of {', '.join(known)}")
    return [name for name in known if layers is None or name in layers]


def side_of(layer: str) -> str:
    """ "encoder" for "encoder.layers.1", and "" for "layers.1"."""
    return layer.rpartition("layers.")[0].rstrip(".")
