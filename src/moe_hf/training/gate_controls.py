"""Whether training made experts specialise: a model's gates beside gates drawn at random.

Experts tell much about the token even where nobody taught the gate, since it reads the token. What a trained gate
tells more than one drawn at random, behind the same layers or behind untrained ones, is what the training did.
"""

import copy
import statistics
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..evaluation.report_numbers import mean_and_range
from ..evaluation.routing import moe_layers
from ..evaluation.routing_statistics import LayerRouting, collect_routing, side_of
from ..evaluation.specialisation import bits_of_experts, specialisation
from .routing_input import batches_with_progress, load_for_routing, num_positions, open_text

TRAINED, DRAWN, UNTRAINED = "trained", "trained model, gates drawn", "untrained model, gates drawn"
# An expert that tells that much halves what is uncertain about a token.
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

    In bits above those of permuted experts (see `specialisation`), and how many experts tell at least 1 bit. Of each
    MoE layer three rows: the trained model, the same with gates drawn at random, and an untrained model with gates
    drawn; means and ranges over `seeds`.

    Args:
        model, files, target_language, max_tokens: as for `routing_report`.
        seeds: of the drawn gates and the untrained models, at least one.

    Raises:
        InputError: an argument is out of range, or a file or the model cannot be read.
    """
    if max_tokens < 1 or not seeds:
        raise InputError(f"max_tokens={max_tokens} must be at least 1, and seeds={list(seeds)} at least one")
    trained, tokenizer = load_for_routing(model, target_language)
    if not moe_layers(trained):
        raise InputError(f"model={model} has no MoE layer to report on")
    text = open_text(trained, tokenizer, files, target_language=target_language, max_tokens=max_tokens)
    models = [(TRAINED, trained)]
    models += [(DRAWN, with_drawn_gates(trained, trained, seed)) for seed in seeds]
    models += [(UNTRAINED, with_drawn_gates(_untrained(trained, seed), trained, seed)) for seed in seeds]

    measured: dict[tuple[str, str], list[list[float]]] = {}
    while models:
        kind, one = models.pop(0)
        for layer, routing in collect_routing(one, batches_with_progress(text, one), num_positions(text)).items():
            measured.setdefault((layer, kind), []).append(_measure(routing, text.sides[side_of(layer)]))
    n = trained.config.num_experts
    heads = ["layer", "gates", "bits, token read", "bits, token after it"]
    heads += [f"experts of {n} that tell {BITS_OF_A_SPECIALIST:g} bit of the token read", "of the token after it"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (layer, kind), rows in sorted(measured.items(), key=lambda item: item[0][0]):  # stable: kinds as they came
        bits = [mean_and_range(list(column)) for column in list(zip(*rows))[:2]]
        counts = [_count_and_range(column) for column in list(zip(*rows))[2:]]
        lines.append(f"| {layer} | {kind} | {' | '.join(bits + counts)} |")
    return "\n".join(lines)


@torch.no_grad()
def with_drawn_gates(model: PreTrainedModel, trained: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy whose gates choose at random: normal weights of the standard deviation of `trained`'s own.

    The thresholds of strictly balanced gating, which fit a trained gate only, become 0: each token then goes to all
    experts, of which the strongest is the one that counts.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    for block, of_trained in zip(moe_layers(model).values(), moe_layers(trained).values(), strict=True):
        for (name, weight), reference in zip(block.gate.named_parameters(), of_trained.gate.parameters(), strict=True):
            if name.endswith("threshold"):
                weight.zero_()
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * reference.float().std().cpu())
    return model


def _untrained(trained: PreTrainedModel, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(trained)(copy.deepcopy(trained.config)).to(trained.device)


def _measure(routing: LayerRouting, text) -> list[float]:
    """Bits about the token read and the one after it, then the numbers of experts that tell enough of either."""
    strongest, sides = routing.experts[:, 0], (text.ids, text.following)
    found = [specialisation(strongest, ids) for ids in sides]
    bits = [one.bits - one.control_mean for one in found]
    per_expert = [bits_of_experts(strongest, ids, routing.num_experts) for ids in sides]
    return bits + [int((values >= BITS_OF_A_SPECIALIST).sum()) for values in per_expert]


def _count_and_range(counts: Sequence[int]) -> str:
    mean = f"{statistics.fmean(counts):.0f}"
    return mean if len(counts) == 1 else f"{mean} ({min(counts)} to {max(counts)})"
