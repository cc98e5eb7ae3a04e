"""The paper in float64, slow and obvious: one token, one expert, one number at a time.

Written from the equations, not from the package. Everything is differentiable, so gradients can be compared too.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch


class Gating(NamedTuple):
    """Per token a dict {expert: G(x)_i} and a list of P(x, i) (or None); then Importance, Load and token counts.

    threshold_loss: L_batchwise over the number of tokens, for strictly balanced gating only.
    """

    gates: list
    probabilities: list
    importance: torch.Tensor
    load: torch.Tensor
    counts: list
    threshold_loss: torch.Tensor | None = None


def softplus(x):
    return torch.log(1 + torch.exp(x))


def normal_cdf(z):
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def top_k_ids(values, k):
    return sorted(range(len(values)), key=lambda i: -values[i].item())[:k]


def softmax_over(values, kept):
    """{i: exp(v_i) / sum over the kept j of exp(v_j)}."""
    total = sum(torch.exp(values[j]) for j in kept)
    return {i: torch.exp(values[i]) / total for i in kept}


def kth_excluding(values, k, i):
    """The k-th highest entry of `values`, leaving out entry i."""
    others = [value for j, value in enumerate(values) if j != i]
    return sorted(others, key=lambda value: -value.item())[k - 1]


def probability_in_top_k(clean, noisy, stddev, k, i):
    """P(x, i) of one token (equation 9)."""
    return normal_cdf((clean[i] - kth_excluding(noisy, k, i)) / stddev[i])


def gate(tokens, weight, k, noise_weight=None, noise=None, noise_epsilon=0.0):
    """Noisy top-k gating of a list of tokens; `noise` holds one standard normal draw per token and expert.

    Without noise the gate is noiseless. Load is then the number of tokens of each expert, as it is for k = n.
    """
    num_experts = len(weight)
    gates, probabilities = [], []
    for t, x in enumerate(tokens):
        clean = [x @ weight[i] for i in range(num_experts)]
        noisy, stddev = clean, None
        if noise is not None:
            stddev = [softplus(x @ noise_weight[i]) + noise_epsilon for i in range(num_experts)]
            noisy = [clean[i] + noise[t][i] * stddev[i] for i in range(num_experts)]
        gates.append(softmax_over(noisy, top_k_ids(noisy, k)))
        smooth = noise is not None and k < num_experts
        row = [probability_in_top_k(clean, noisy, stddev, k, i) for i in range(num_experts)] if smooth else None
        probabilities.append(row)

    zero = torch.zeros((), dtype=weight.dtype)
    importance = torch.stack([sum((g[i] for g in gates if i in g), zero) for i in range(num_experts)])
    counts = [sum(i in g for g in gates) for i in range(num_experts)]
    load = torch.tensor(counts, dtype=weight.dtype)
    if probabilities and probabilities[0] is not None:
        load = torch.stack([sum(p[i] for p in probabilities) for i in range(num_experts)])
    return Gating(gates, probabilities, importance, load, counts)


def hierarchical_gate(tokens, weights, k_groups, k_per_group, noises=None, noise_epsilon=0.0):
    """Hierarchical gating (appendix B).

    Args:
        weights: the gate's parameters by name; parameters of the secondary gates are stacked by group.
        noises: None, or a pair: one draw per token and group, and a dict from (token, chosen group) to one draw per
            expert of the group.
    """
    primary_noise, secondary_noise = (None, None) if noises is None else noises
    primary = gate(
        tokens, weights["primary.weight"], k_groups, weights["primary.noise_weight"], primary_noise, noise_epsilon
    )
    num_groups, per_group = weights["weight"].shape[:2]
    gates = [{} for _ in tokens]
    load, counts = [], []
    for i in range(num_groups):
        members = [t for t in range(len(tokens)) if i in primary.gates[t]]  # X^(i)
        noise = None if noises is None else [secondary_noise[t, i] for t in members]
        secondary = gate(
            [tokens[t] for t in members],
            weights["weight"][i],
            k_per_group,
            weights["noise_weight"][i],
            noise,
            noise_epsilon,
        )
        for t, gates_in_group in zip(members, secondary.gates):
            for j, value in gates_in_group.items():
                gates[t][i * per_group + j] = primary.gates[t][i] * value
        for j in range(per_group):
            load.append(primary.load[i] * secondary.load[j] / max(len(members), 1))
        counts += secondary.counts
    zero = torch.zeros((), dtype=weights["weight"].dtype)
    importance = [sum((g[e] for g in gates if e in g), zero) for e in range(num_groups * per_group)]
    return Gating(gates, [], torch.stack(importance), torch.stack(load), counts)


def tokens_for_each_expert(num_tokens, num_experts, k):
    """k B / n rounded to the nearest integer, halves up; at least 1, at most B."""
    m = math.floor(Fraction(k * num_tokens, num_experts) + Fraction(1, 2))
    return min(max(m, 1), num_tokens)


def strictly_balanced_gate(tokens, weight, threshold, k, training):
    """Appendix F: the batchwise mask in training, the thresholds in evaluation."""
    num_experts, gates, loss = len(weight), [], 0 * (weight.sum() + threshold.sum())
    m = tokens_for_each_expert(len(tokens), num_experts, k)
    values = [softmax_over([x @ weight[i] for i in range(num_experts)], range(num_experts)) for x in tokens]
    by_batch = set()
    for i in range(num_experts):
        falling = sorted(range(len(tokens)), key=lambda t: -values[t][i].item())  # stable: first of equals first
        by_batch |= {(t, i) for t in falling[:m]}
    by_threshold = {(t, i) for t in range(len(tokens)) for i in range(num_experts) if values[t][i] > threshold[i]}
    chosen = by_batch if training else by_threshold
    for t in range(len(tokens)):
        kept = [i for i in range(num_experts) if (t, i) in chosen]
        total = sum(values[t][i] for i in kept)
        gates.append({i: values[t][i] / total for i in kept})
        for i in range(num_experts):
            loss = loss + (((t, i) in by_threshold) - ((t, i) in by_batch)) * (values[t][i] - threshold[i])
    zero = torch.zeros((), dtype=weight.dtype)
    importance = torch.stack([sum((g[i] for g in gates if i in g), zero) for i in range(num_experts)])
    counts = [sum(i in g for g in gates) for i in range(num_experts)]
    load = torch.tensor(counts, dtype=weight.dtype)
    return Gating(gates, [], importance, load, counts, loss / max(len(tokens), 1))


def cv_squared(values):
    """Population variance over squared mean."""
    mean = sum(values) / len(values)
    if mean == 0:
        return mean
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def balancing_loss(gating, importance_coef, load_coef):
    return importance_coef * cv_squared(gating.importance) + load_coef * cv_squared(gating.load)


def layer_loss(gating, config):
    """The balancing losses of one layer; with strictly balanced gating the thresholds' loss replaces Load's loss."""
    if gating.threshold_loss is None:
        return balancing_loss(gating, config.importance_loss_coef, config.load_loss_coef)
    return balancing_loss(gating, config.importance_loss_coef, 0) + config.threshold_loss_coef * gating.threshold_loss


def expert(x, up, down, mid=()):
    """E_i(x) of one token: linear, ReLU, (linear, ReLU, ...) linear."""
    hidden = torch.relu(up @ x)
    for layer in mid:
        hidden = torch.relu(layer @ hidden)
    return down @ hidden


def mix_experts(x, gates, up, down, mid=()):
    """y = sum_i G(x)_i E_i(x) of one token (equation 1); `gates` is {expert: weight}."""
    y = torch.zeros_like(x)
    for i, weight in gates.items():
        y = y + weight * expert(x, up[i], down[i], [layer[i] for layer in mid])
    return y


def moe_block(tokens, weights, k, noise=None, noise_epsilon=0.0, training=False):
    """x + sigmoid(y) for a list of tokens, and the `Gating`. `weights`: the block's parameters by name.

    training: selects the mode of strictly balanced gating; other gates differ only by their noise.
    """
    if "gate.threshold" in weights:
        gating = strictly_balanced_gate(tokens, weights["gate.weight"], weights["gate.threshold"], k, training)
    else:
        gating = gate(tokens, weights["gate.weight"], k, weights.get("gate.noise_weight"), noise, noise_epsilon)
    up, down, mid = weights["experts.up_proj"], weights["experts.down_proj"], weights.get("experts.mid_proj", ())
    outputs = [x + torch.sigmoid(mix_experts(x, g, up, down, mid)) for x, g in zip(tokens, gating.gates)]
    return outputs, gating


def lstm_step(x, h, c, weights):
    """One step of an LSTM with one bias vector, gates in the order i, f, g, o, and an optional projection."""
    units = len(c)
    gates = weights["weight_ih"] @ x + weights["weight_hh"] @ h + weights["bias"]
    i, f = torch.sigmoid(gates[:units]), torch.sigmoid(gates[units : 2 * units])
    g, o = torch.tanh(gates[2 * units : 3 * units]), torch.sigmoid(gates[3 * units :])
    c = f * c + i * g
    h = o * torch.tanh(c)
    if "weight_hr" in weights:
        h = weights["weight_hr"] @ h
    return h, c


def lstm_layer(rows, weights, h=None, c=None):
    """x_t + h_t over one sequence (a list of vectors), and the last state."""
    if h is None:
        h = torch.zeros(weights["weight_hh"].shape[1], dtype=torch.float64)
        c = torch.zeros(len(weights["bias"]) // 4, dtype=torch.float64)
    outputs = []
    for x in rows:
        h, c = lstm_step(x, h, c, weights)
        outputs.append(x + h)
    return outputs, h, c


class LanguageModelOutput(NamedTuple):
    """logits {(row, position): (V,)} of the real positions, the mean task loss (or None), the balancing losses."""

    logits: dict
    task_loss: torch.Tensor | None
    aux_loss: torch.Tensor


def language_model(config, weights, input_ids, mask=None, noises=None, labels=None, training=False):
    """The whole model on (B, S) ids without dropout; `weights`: all parameters by their name in a checkpoint.

    noises: one (B * S, E) draw per MoE layer, rows in the order of the padded batch; None in evaluation.
    """
    batch, length = input_ids.shape
    real = [[s for s in range(length) if mask is None or mask[b, s]] for b in range(batch)]
    embedding = weights["model.embed_tokens.weight"]
    scale = config.hidden_size**0.5 if config.scale_embedding else 1
    hidden = {(b, s): scale * embedding[input_ids[b, s]] for b in range(batch) for s in real[b]}
    aux_loss = torch.zeros((), dtype=torch.float64)
    noises = iter(noises or [])
    for index, name in enumerate(config.layer_pattern):
        prefix = f"model.layers.{index}."
        layer = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        if name == "lstm":
            for b in range(batch):
                outputs, _, _ = lstm_layer([hidden[b, s] for s in real[b]], layer)
                hidden.update({(b, s): output for s, output in zip(real[b], outputs)})
        else:
            noise = next(noises, None)
            noise = None if noise is None else [noise[b * length + s] for b, s in hidden]
            outputs, gating = moe_block(
                list(hidden.values()), layer, config.num_experts_per_tok, noise, config.noise_epsilon, training
            )
            hidden = dict(zip(hidden, outputs))
            aux_loss = aux_loss + layer_loss(gating, config)
    head = weights.get("lm_head.weight", embedding)
    logits = {position: head @ x for position, x in hidden.items()}
    losses = []
    for b, s in logits if labels is not None else ():
        if (b, s + 1) in logits and labels[b, s + 1] != -100:
            losses.append(-torch.log_softmax(logits[b, s], dim=0)[labels[b, s + 1]])
    return LanguageModelOutput(logits, sum(losses) / len(losses) if losses else None, aux_loss)
