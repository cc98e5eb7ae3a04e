"""Prepares the data of a routing report's page: JSON with packed arrays.

Shape suffixes: E experts, P positions of a text, R positions that the report keeps, V tokens of its vocabulary.
"""

import base64
import math

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..models.configuration_moe import MoeConfig
from ..version import __version__
from .coactivation import PairCounts
from .history_plot import CURVES
from .specialisation import specialisation
from .statistics import LayerRouting, side_of
from .texts import SideText
from .token_texts import FRAGMENT, token_texts, whole_characters

PASSAGE = 1500  # number of tokens at the beginning of the text that the page shows
NUM_TYPICAL, NUM_PARTNERS, NUM_EXPERTS_OF_WORD = 6, 6, 5
NUM_PAIRS = 50
LARGEST_MATRIX = 128  # number of experts up to which the page draws all pairs
HISTORY_POINTS = 400
NONE = 0xFFFFFFFF


def report_data(
    facts: dict,
    config: MoeConfig,
    routing: dict[str, LayerRouting],
    sides: dict[str, SideText],
    tokenizer: PreTrainedTokenizerBase,
    history: dict,
    num_contexts: int,
    context_width: int,
) -> dict:
    """Return all data that the page shows.

    Args:
        facts: model, files and family, shown unchanged.
        config: the model's configuration.
        routing: the result of `collect_routing`.
        sides: {side of the model: the `SideText` that it read}.
        tokenizer: the tokenizer that produced the ids in `sides`.
        history: the result of `read_expert_history`, or {}.
        num_contexts: number of contexts shown for each expert.
        context_width: number of tokens shown on each side of a context's middle.

    Returns:
        {facts, vocabulary, sides, layers}, which json.dumps can write. Arrays are {type, bytes}, see `pack`.
    """
    contexts = {
        name: distinct_contexts(layer, sides[side_of(name)], num_contexts, context_width)
        for name, layer in routing.items()
    }
    kept = {side: _kept_positions(text, side, contexts, context_width) for side, text in sides.items()}
    ids_V = np.unique(np.concatenate([sides[side].ids[positions] for side, positions in kept.items()]))
    texts_V = token_texts(tokenizer, ids_V.tolist())
    layers = []
    for name, layer in routing.items():
        side = side_of(name)
        curves = history.get(name)
        layers.append(
            {
                "name": name,
                "side": side,
                "num_experts": layer.num_experts,
                "experts_per_token": config.num_experts_per_tok,
                "group_size": layer.group_size,
                "summary": layer.summary(),
                "specialisation": _specialisation(layer, sides[side]),
                "importance": pack(layer.importance, "f4"),
                "load": pack(layer.load, "u4"),
                "entropy": _histogram(layer.entropy[layer.num_used > 0], config.num_experts_per_tok),
                "experts_of_token": _experts_of_token(layer),
                "contexts": _pack_contexts(contexts[name], kept[side]),
                "routing": _pack_routing(layer, kept[side]),
                "words": _words(layer, sides[side], ids_V),
                "coactivation": None if layer.pairs is None else coactivation_data(layer.pairs, layer.load),
                "history": None if curves is None else _thinned(curves),
            }
        )
    return {
        "facts": {**facts, "gating": config.gating, "version": __version__},
        "vocabulary": {
            "texts": texts_V,
            "special": np.flatnonzero(np.isin(ids_V, list(tokenizer.all_special_ids))).tolist(),
        },
        "context_width": context_width,
        "history_names": CURVES,
        "sides": {
            side: _side_data(sides[side], positions, ids_V, texts_V, tokenizer) for side, positions in kept.items()
        },
        "layers": layers,
    }


def pack(values: np.ndarray, kind: str) -> dict[str, str]:
    """Encode an array as base64 of its little-endian bytes.

    Args:
        values: the array.
        kind: one of u1, u2, u4, i4, f4.

    Returns:
        {"type": kind, "bytes": text}.
    """
    return {"type": kind, "bytes": base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()}


def distinct_contexts(
    layer: LayerRouting, text: SideText, num_contexts: int, width: int
) -> list[list[tuple[int, float]]]:
    """Return the places in a text with the highest gate values of each expert, without repeated contexts.

    Args:
        layer: the routing of the text.
        text: the text that the layer's side of the model read.
        num_contexts: maximal number of places for each expert.
        width: number of tokens compared on each side of a place; the comparison stops at the text's `starts`.

    Returns:
        For each expert a list of (position, gate value), the highest value first.
    """
    ends = np.append(text.starts[1:], len(text.ids))
    found = []
    for positions, values in zip(layer.contexts.positions, layer.contexts.values):
        seen, contexts = set(), []
        for position, value in zip(positions.tolist(), values.tolist()):
            if position < 0 or len(contexts) == num_contexts:
                break
            sentence = np.searchsorted(text.starts, position, side="right") - 1
            left = max(text.starts[sentence], position - width)
            words = (position - left, text.ids[left : min(ends[sentence], position + width + 1)].tobytes())
            if words not in seen:
                seen.add(words)
                contexts.append((position, value))
        found.append(contexts)
    return found


def _kept_positions(text, side: str, contexts: dict, width: int) -> np.ndarray:
    """Return the positions (R,) that the page shows, in rising order: a passage, and all contexts with neighbours."""
    is_kept = np.zeros(len(text.ids), dtype=bool)
    is_kept[:PASSAGE] = True
    layers = [found for name, found in contexts.items() if side_of(name) == side]
    middles = np.unique([position for found in layers for expert in found for position, _ in expert]).astype(int)
    for shift in range(-width, width + 1):
        is_kept[np.clip(middles + shift, 0, len(text.ids) - 1)] = True
    return np.flatnonzero(is_kept)


def _side_data(text, kept_R: np.ndarray, ids_V: np.ndarray, texts_V: list[str], tokenizer) -> dict:
    words_R = np.searchsorted(ids_V, text.ids[kept_R])
    fragments = np.flatnonzero(np.array([FRAGMENT in word for word in texts_V])[words_R])
    whole = []  # [place, text] for tokens that are parts of characters
    for run in np.split(fragments, np.flatnonzero(np.diff(fragments) > 1) + 1) if len(fragments) else ():
        whole += zip(run.tolist(), whole_characters(tokenizer, text.ids[kept_R[run]].tolist()))
    return {
        "tokens": pack(words_R, "u4"),
        "whole": whole,
        "positions": pack(kept_R, "u4"),
        "starts": pack(np.flatnonzero(np.isin(kept_R, text.starts)), "u4"),
        "passage": int((kept_R < PASSAGE).sum()),
        "length": len(text.ids),
    }


def _pack_contexts(contexts: list[list[tuple[int, float]]], kept_R: np.ndarray) -> dict:
    flat = [context for expert in contexts for context in expert]
    return {
        "offsets": pack(np.cumsum([0, *map(len, contexts)]), "u4"),
        "places": pack(np.searchsorted(kept_R, [position for position, _ in flat]), "u4"),
        "gates": pack(np.array([value for _, value in flat]), "f4"),
    }


def _pack_routing(layer: LayerRouting, kept_R: np.ndarray) -> dict:
    """Pack the experts of every position kept, with gate values in units of 1 / 65535."""
    num_used_R = np.maximum(layer.num_used[kept_R], 0)
    width = max(1, min(int(num_used_R.max(initial=1)), layer.experts.shape[1]))
    return {
        "width": width,
        "num_used": pack(num_used_R, "u4"),
        "experts": pack(np.maximum(layer.experts[kept_R, :width], 0), "u4"),
        "gates": pack(np.rint(layer.gates[kept_R, :width] * 65535), "u2"),
    }


def _specialisation(layer: LayerRouting, text) -> dict:
    best = layer.experts[:, 0]
    return {name: specialisation(best, ids)._asdict() for name, ids in (("read", text.ids), ("next", text.following))}


def _histogram(entropies: np.ndarray, k: int) -> dict:
    """Count entropies in 32 bins from 0 to the maximum, which is log2 k for k experts."""
    high = max(math.log2(k), float(entropies.max(initial=0.0))) or 1.0
    return {"high": high, "counts": np.histogram(entropies, bins=32, range=(0, high))[0].tolist()}


def _experts_of_token(layer: LayerRouting) -> list[list[int]]:
    numbers, counts = np.unique(layer.num_used[layer.num_used >= 0], return_counts=True)
    return [[int(number), int(count)] for number, count in zip(numbers, counts)]


def _words(layer: LayerRouting, text, ids_V: np.ndarray) -> dict:
    """Return the count and the most frequent experts of each word, and the typical words of each expert.

    Typical words have the highest (observed - expected) / sqrt(expected). The expected count is the expert's share of
    the tokens times the word's count. A word that an expert got only once is not typical.
    """
    read = layer.num_used >= 0
    word_P = np.searchsorted(ids_V, text.ids)
    word_P[(word_P == len(ids_V)) | (ids_V[np.minimum(word_P, len(ids_V) - 1)] != text.ids)] = len(ids_V)
    counts_V = np.bincount(word_P[read], minlength=len(ids_V) + 1)[:-1]

    place, slot = np.nonzero((layer.experts >= 0) & (word_P < len(ids_V))[:, None])
    code, hits = np.unique(word_P[place] * layer.num_experts + layer.experts[place, slot], return_counts=True)
    word, expert = code // layer.num_experts, code % layer.num_experts
    favourite = _best_of_each(word, hits, len(ids_V), NUM_EXPERTS_OF_WORD)

    # For a dense gate, this counts only the experts kept.
    load = np.bincount(layer.experts[layer.experts >= 0], minlength=layer.num_experts)
    expected = load[expert] * counts_V[word] / max(int(read.sum()), 1)
    surplus = np.where(hits > 1, (hits - expected) / np.sqrt(expected), 0)
    typical = _best_of_each(expert, np.maximum(surplus, 0), layer.num_experts, NUM_TYPICAL)
    return {
        "counts": pack(counts_V, "u4"),
        "favourites": {
            "width": NUM_EXPERTS_OF_WORD,
            "experts": pack(_pick(expert, favourite), "u4"),
            "hits": pack(_pick(hits, favourite, 0), "u4"),
        },
        "typical": {
            "width": NUM_TYPICAL,
            "words": pack(_pick(word, typical), "u4"),
            "hits": pack(_pick(hits, typical, 0), "u4"),
        },
    }


def coactivation_data(pairs: PairCounts, load_E: np.ndarray) -> dict:
    """Return the pairs of experts furthest above chance, overall and for each expert; for few experts, all pairs."""
    first, second, counts = pairs.pairs()
    expected = pairs.expected(first, second, load_E)
    lift, num_experts = counts / expected, len(load_E)
    surplus = (counts - expected) / np.sqrt(expected)
    best = np.argsort(-surplus, kind="stable")[:NUM_PAIRS]
    best = best[surplus[best] > 0]
    both = np.concatenate([first, second])
    partners = _best_of_each(both, np.maximum(np.tile(surplus, 2), 0), num_experts, NUM_PARTNERS)
    matrix = None
    if num_experts <= LARGEST_MATRIX:
        matrix = pack(pair_matrix(pairs, load_E), "f4")
    return {
        "missed": pairs.missed,
        "top": [[int(first[i]), int(second[i]), int(counts[i]), float(f"{expected[i]:.6g}")] for i in best.tolist()],
        "partners": {
            "width": NUM_PARTNERS,
            "experts": pack(_pick(np.concatenate([second, first]), partners), "u4"),
            "counts": pack(_pick(np.tile(counts, 2), partners, 0), "u4"),
            "lifts": pack(_pick(np.tile(lift, 2), partners, 0), "f4"),
        },
        "matrix": matrix,
    }


def pair_matrix(pairs: PairCounts, load_E: np.ndarray) -> np.ndarray:
    """Return (E, E): observed over expected count of tokens that two experts share; NaN if the expected count is 0."""
    first, second = np.triu_indices(len(load_E), 1)
    expected = pairs.expected(first, second, load_E)
    counts = np.zeros((len(load_E), len(load_E)))
    a, b, seen = pairs.pairs()
    counts[a, b] = seen
    matrix = np.full(counts.shape, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = np.where(expected > 0, counts[first, second] / expected, np.nan)
    matrix[first, second] = matrix[second, first] = lift
    return matrix


def _best_of_each(owner: np.ndarray, score: np.ndarray, num_owners: int, width: int) -> np.ndarray:
    """Return (num_owners, width): indices of each owner's highest scores above 0, the highest first; -1 if unused."""
    order = np.lexsort((-score, owner))
    order = order[score[order] > 0]
    rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    table = np.full((num_owners, width), -1, dtype=np.int64)
    kept = rank < width
    table[owner[order[kept]], rank[kept]] = order[kept]
    return table


def _pick(values: np.ndarray, table: np.ndarray, none: int = NONE) -> np.ndarray:
    """Return `values` at the indices of the table, and `none` where the index is -1."""
    if len(values) == 0:
        return np.full(table.shape, none)
    return np.where(table >= 0, values[np.maximum(table, 0)], none)


def _thinned(curves: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """Return at most `HISTORY_POINTS` of each curve, including the last point; values that are not finite are None."""
    size = len(curves["step"])
    chosen = np.unique(np.linspace(0, size - 1, min(size, HISTORY_POINTS)).round().astype(int)).tolist()
    return {name: [values[i] if math.isfinite(values[i]) else None for i in chosen] for name, values in curves.items()}
