"""The translation model in float64, slow and obvious: one position at a time, from the equations alone.

Sentences are lists without padding; the caller maps them to positions of a padded batch.
"""

from typing import NamedTuple

import torch
from naive_moe import balancing_loss, lstm_step, moe_block


class TranslationOutput(NamedTuple):
    """Logits and attention weights per row (a list per target position), and the balancing losses."""

    logits: list
    weights: list
    aux_loss: torch.Tensor


def part(weights, prefix):
    """The parameters whose names start with a prefix, by the rest of the name."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def zero_state(weights):
    zeros = {"dtype": torch.float64}
    return torch.zeros(weights["weight_hh"].shape[1], **zeros), torch.zeros(len(weights["bias"]) // 4, **zeros)


def lstm(rows, weights):
    """The outputs over a list of inputs, from a zero state."""
    (h, c), outputs = zero_state(weights), []
    for x in rows:
        h, c = lstm_step(x, h, c, weights)
        outputs.append(h)
    return outputs


def attend(query, source, weights, kind):
    """The weights over the source positions, and the context (appendix G)."""
    scores = []
    for x in source:
        score = 0.0
        for d in range(len(x)):
            from_source, from_query = weights["source_weight"][d] @ x, weights["query_weight"][d] @ query
            if kind == "product":
                score = score + weights["score_weight"][d] * torch.tanh(from_source) * torch.tanh(from_query)
            else:
                score = score + weights["score_weight"][d] * torch.tanh(from_source + from_query)
        scores.append(score)
    total = sum(torch.exp(score) for score in scores)
    probabilities = [torch.exp(score) / total for score in scores]
    return probabilities, sum(p * x for p, x in zip(probabilities, source))


def moe(sentences, weights, config):
    """A MoE layer over all sentences of a batch at once, without noise; and its balancing loss."""
    tokens = [x for sentence in sentences for x in sentence]
    outputs, gating = moe_block(tokens, weights, config.num_experts_per_tok)
    outputs = iter(outputs)
    loss = balancing_loss(gating, config.importance_loss_coef, config.load_loss_coef)
    return [[next(outputs) for _ in sentence] for sentence in sentences], loss


def embed(config, embedding, sentences):
    scale = config.hidden_size**0.5 if config.scale_embedding else 1
    return [[scale * embedding[i] for i in sentence] for sentence in sentences]


def encode(config, weights, sources):
    """The encoder's output for a list of lists of ids, and its balancing losses."""
    sentences = embed(config, weights["encoder.embed_tokens.weight"], sources)
    aux_loss, both = torch.zeros((), dtype=torch.float64), None
    for index, name in enumerate(config.encoder_layer_pattern):
        layer = part(weights, f"encoder.layers.{index}.")
        if name == "moe":
            sentences, loss = moe(sentences, layer, config)
            aux_loss = aux_loss + loss
        elif index == 0 and config.encoder_bidirectional_first:
            both = []
            for b, xs in enumerate(sentences):
                forward = [x + h for x, h in zip(xs, lstm(xs, part(layer, "forward_lstm.")))]
                backward = [x + h for x, h in zip(xs[::-1], lstm(xs[::-1], part(layer, "backward_lstm.")))][::-1]
                both.append([torch.cat([f, r]) for f, r in zip(forward, backward)])
                sentences[b] = [(f + r) / 2 for f, r in zip(forward, backward)]
            continue
        else:
            inputs = both or sentences
            sentences = [[x + h for x, h in zip(xs, lstm(ins, layer))] for xs, ins in zip(sentences, inputs)]
        both = None
    return sentences, aux_loss


def bottom_layer(config, xs, source, weights):
    """Outputs, contexts and attention weights of the decoder's first layer for one sentence."""
    attention = part(weights, "attention.")
    (h, c), outputs, contexts, all_weights = zero_state(weights), [], [], []
    for x in xs:
        if config.attention_feeding == "parallel":
            h, c = lstm_step(x, h, c, weights)
        else:
            probabilities, context = attend(h, source, attention, config.attention_type)
            h, c = lstm_step(torch.cat([x, context]), h, c, weights)
        if config.attention_feeding != "recurrent":
            probabilities, context = attend(h, source, attention, config.attention_type)
        outputs.append(x + h)
        contexts.append(context)
        all_weights.append(torch.stack(probabilities))
    return outputs, contexts, all_weights


def translation_model(config, weights, sources, targets):
    """The whole model without dropout and noise; `weights`: all parameters by their name in a checkpoint."""
    head, weights = weights.get("lm_head.weight"), part(weights, "model.")
    encoded, aux_loss = encode(config, weights, sources)
    target_embedding = weights.get("decoder.embed_tokens.weight", weights["encoder.embed_tokens.weight"])
    embeddings = embed(config, target_embedding, targets)
    sentences = list(embeddings)
    contexts, all_weights = [], []
    for index, name in enumerate(config.decoder_layer_pattern):
        layer = part(weights, f"decoder.layers.{index}.")
        if index == 0:
            for b, xs in enumerate(sentences):
                sentences[b], context, row_weights = bottom_layer(config, xs, encoded[b], layer)
                contexts.append(context)
                all_weights.append(row_weights)
        elif name == "lstm":
            for b, xs in enumerate(sentences):
                inputs = [torch.cat([x, context]) for x, context in zip(xs, contexts[b])]
                sentences[b] = [x + h for x, h in zip(xs, lstm(inputs, layer))]
        else:
            sentences, loss = moe(sentences, layer, config)
            aux_loss = aux_loss + loss
    if config.deep_output:
        for b, xs in enumerate(sentences):
            inputs = [torch.cat(parts) for parts in zip(xs, embeddings[b], contexts[b])]
            weight, bias = weights["decoder.deep_output.weight"], weights["decoder.deep_output.bias"]
            sentences[b] = [torch.tanh(weight @ x + bias) for x in inputs]
    head = target_embedding if head is None else head
    return TranslationOutput([[head @ x for x in xs] for xs in sentences], all_weights, aux_loss)
