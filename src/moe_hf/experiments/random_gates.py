"""Whether training made experts specialise: a model's gates beside gates drawn at random.

Experts tell much about the token even where nobody taught the gate, since it reads the token. What a trained gate
tells more than one drawn at random, behind the same layers or behind untrained ones, is what the training did.
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
# See `bits_of_experts`. One that gets half of all words, each as often as another, and no other word, tells 1 bit.
BITS_OF_A_SPECIALIST = 1.0


def specialisation_table(
    model: str,
    files: list[str],
    *,
    target_language: str | None = None,
    max_tokens: int = 200_000,
    seeds: Sequence[int] = (0, 1, 2),
) -> str:
    """A Markdown table: what the strongest expert tells about the token that is read and the one after it.

    The unit is bits above those of permuted experts (see `specialisation`); beside them stands how many experts tell
    at least 1 bit. Both grow with the text: compare only rows that count about as many tokens. Each MoE layer has
    three rows: the trained model, the same with gates drawn at random, and an untrained model with gates drawn.
    Numbers are means and ranges over `seeds`.

    Args:
        model: as for `routing_report`.
        files: as for `routing_report`.
        target_language: as for `routing_report`.
        max_tokens: as for `routing_report`.
        seeds: seeds of the drawn gates and the untrained models, at least one.

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
    for (layer, kind), rows in sorted(measured.items(), key=lambda item: item[0][0]):  # stable: kinds as they came
        tokens, *bits = (list(column) for column in list(zip(*rows))[:3])
        cells = [f"{statistics.fmean(tokens):,.0f}", *map(mean_and_range, bits)]
        cells += [_count_and_range(column) for column in list(zip(*rows))[3:]]
        lines.append(f"| {layer} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _models(trained: PreTrainedModel, seeds: Sequence[int]) -> Iterator[tuple[str, PreTrainedModel]]:
    """The trained model, and those with random gates, made one by one."""
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
    """Let the gates of `model` choose at random: normal weights of the standard deviation of `trained`'s own.

    Strictly balanced gates become top-k gates with the same k, as their thresholds fit trained weights only.

    Args:
        model: gets the gates.
        trained: a model of the same layers.
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
            std = float(trained_weights[name].float().std()) or 1.0  # a gate that was never trained is zero
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def _measure(routing: LayerRouting, text) -> list[float]:
    """Tokens, bits about the token read and the one after it, and how many experts tell enough of either."""
    strongest, sides = routing.experts[:, 0], (text.ids, text.following)
    found = [specialisation(strongest, ids) for ids in sides]
    bits = [one.bits - one.control_mean for one in found]
    per_expert = [bits_of_experts(strongest, ids, routing.num_experts) for ids in sides]
    return [found[0].num_tokens, *bits] + [int((values >= BITS_OF_A_SPECIALIST).sum()) for values in per_expert]


def _count_and_range(counts: Sequence[int]) -> str:
    mean = f"{statistics.fmean(counts):.0f}"
    return mean if len(counts) == 1 else f"{mean} ({min(counts)} to {max(counts)})"
