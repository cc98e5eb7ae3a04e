"""Measures whether training made experts specialise, by comparison with gates that have random weights.

The choice of an expert tells much about the token even with an untrained gate, because the gate reads the token.
Training accounts only for the information of a trained gate beyond the information of a random gate. A random gate
follows either the same trained layers or untrained layers.
"""

import copy
import statistics
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.balanced_gating import StrictlyBalancedGate
from ..models.gating import SoftmaxTopKGate
from ..routing.inputs import batches_with_progress, load_for_routing, num_positions, open_text
from ..routing.observe import moe_layers
from ..routing.specialisation import bits_of_experts, specialisation
from ..routing.statistics import LayerRouting, collect_routing, side_of
from .numbers import mean_and_range

TRAINED, DRAWN, UNTRAINED = "trained", "trained model, gates drawn", "untrained model, gates drawn"
# See `bits_of_experts`. With equally frequent words, an expert that gets only one half of the vocabulary tells 1 bit.
BITS_OF_A_SPECIALIST = 1.0


def specialisation_table(
    model: str,
    files: list[str],
    *,
    target_language: str | None = None,
    max_tokens: int = 200_000,
    seeds: Sequence[int] = (0, 1, 2),
) -> str:
    """Return a Markdown table of the information of the strongest expert about the token read and the next token.

    The unit is bits above the control with permuted experts, see `specialisation`. Further columns count the experts
    that tell at least 1 bit. Both measures grow with the text, so compare only rows with similar numbers of tokens.

    Each MoE layer has three rows: the trained model, the trained model with random gates, and an untrained model with
    random gates. Numbers are means over `seeds`, with ranges.

    Args:
        model: as for `routing_report`.
        files: as for `routing_report`.
        target_language: as for `routing_report`.
        max_tokens: as for `routing_report`.
        seeds: seeds of the random gates and the untrained models, at least one.

    Raises:
        InputError: an argument is out of range, or a file or the model cannot be read.
    """
    if max_tokens < 1 or not seeds:
        raise InputError(f"max_tokens={max_tokens} must be at least 1, and seeds={list(seeds)} at least one")
    trained, tokenizer = load_for_routing(model, target_language)
    if not moe_layers(trained):
        raise InputError(f"model={model} has no MoE layer to report on")
    text = open_text(trained, tokenizer, files, target_language=target_language, max_tokens=max_tokens)
    measured: dict[tuple[str, str], list[list[float]]] = {}
    for kind, one in _models(trained, seeds):
        for layer, routing in collect_routing(one, batches_with_progress(text, one), num_positions(text)).items():
            measured.setdefault((layer, kind), []).append(_measure(routing, text.sides[side_of(layer)]))
    n = trained.config.num_experts
    heads = ["layer", "gates", "tokens", "bits, token read", "bits, token after it"]
    heads += [f"experts of {n} that tell {BITS_OF_A_SPECIALIST:g} bit of the token read", "of the token after it"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    # The sort is stable, so the kinds keep their order within a layer.
    for (layer, kind), rows in sorted(measured.items(), key=lambda item: item[0][0]):
        tokens, *bits = (list(column) for column in list(zip(*rows))[:3])
        cells = [f"{statistics.fmean(tokens):,.0f}", *map(mean_and_range, bits)]
        cells += [_count_and_range(column) for column in list(zip(*rows))[3:]]
        lines.append(f"| {layer} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _models(trained: PreTrainedModel, seeds: Sequence[int]) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the trained model, then the models with random gates, created one by one."""
    yield TRAINED, trained
    for seed in seeds:
        yield DRAWN, draw_gates(copy.deepcopy(trained), trained, seed)
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            untrained = type(trained)(copy.deepcopy(trained.config)).to(trained.device, trained.dtype)
        yield UNTRAINED, draw_gates(untrained, trained, seed)


@torch.no_grad()
def draw_gates(model: PreTrainedModel, trained: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give the gates of `model` random normal weights with the standard deviations of the weights of `trained`.

    Strictly balanced gates become top-k gates with the same k, because their thresholds fit only trained weights.

    Args:
        model: the model to change.
        trained: a model with the same layers.
        seed: seed of the weights.

    Returns:
        `model`.
    """
    generator = torch.Generator().manual_seed(seed)
    for block, of_trained in zip(moe_layers(model).values(), moe_layers(trained).values(), strict=True):
        if isinstance(block.gate, StrictlyBalancedGate):
            num_experts, width = block.gate.weight.shape
            gate = SoftmaxTopKGate(width, num_experts, trained.config.num_experts_per_tok)
            block.gate, block.is_strictly_balanced = gate.to(block.gate.weight), False
        trained_weights = dict(of_trained.gate.named_parameters())
        for name, weight in block.gate.named_parameters():
            std = float(trained_weights[name].float().std()) or 1.0  # weights of an untrained gate are zero
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def _measure(routing: LayerRouting, text) -> list[float]:
    """Return the number of tokens, the bits about the token read and the next token, and the specialists for each."""
    strongest, sides = routing.experts[:, 0], (text.ids, text.following)
    found = [specialisation(strongest, ids) for ids in sides]
    bits = [one.bits - one.control_mean for one in found]
    per_expert = [bits_of_experts(strongest, ids, routing.num_experts) for ids in sides]
    return [found[0].num_tokens, *bits] + [int((values >= BITS_OF_A_SPECIALIST).sum()) for values in per_expert]


def _count_and_range(counts: Sequence[int]) -> str:
    mean = f"{statistics.fmean(counts):.0f}"
    return mean if len(counts) == 1 else f"{mean} ({min(counts)} to {max(counts)})"
