"""generate() of the translation model: with and without the cache, padded or alone, and the cached state."""

import pytest
import torch
from tiny_models import FEEDINGS, STRATEGIES, assert_same, padded, sentences, tiny_gnmt
from transformers import DynamicCache, EncoderDecoderCache

VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {"attention_feeding": "recurrent"},
        {"attention_feeding": "parallel", "attention_type": "additive"},
        {"lstm_hidden_size": 12, "decoder_layer_pattern": ["lstm", "lstm", "moe", "lstm"], "share_embeddings": False},
        {"gating": "strictly_balanced"},
        {"deep_output": True, "tie_word_embeddings": True},
        {"num_experts": 8, "num_expert_groups": 4, "num_experts_per_tok": 4},
    ],
    ids=["recurrent", "parallel additive", "deep with projection", "strictly balanced", "deep output", "hierarchical"],
)


def generate(model, input_ids, attention_mask=None, **kwargs):
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(input_ids, attention_mask=attention_mask, **settings)


def new_cache(model):
    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


def states(cache):
    layers = [*cache.self_attention_cache.layers, cache.cross_attention_cache.layers[0]]
    return [tensor for layer in layers for tensor in layer.state if tensor is not None]


def soft_model(**changes):
    """Its outputs are uncertain enough that beams cross."""
    model = tiny_gnmt(seed=8, std=1.0, **changes)
    model.lm_head.weight.data *= 0.4
    return model


@VARIANTS
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_does_not_change_what_is_generated(strategy, changes):
    model, (ids, mask) = soft_model(**changes), padded(sentences(4, 2, 5), 6)
    cached = generate(model, ids, mask, use_cache=True, **STRATEGIES[strategy])
    uncached = generate(model, ids, mask, use_cache=False, **STRATEGIES[strategy])
    assert torch.equal(cached, uncached)
    assert cached.shape == (3 * STRATEGIES[strategy].get("num_return_sequences", 1), 8)
    assert len({tuple(row) for row in cached.tolist()}) > 1


@pytest.mark.parametrize("feeding", FEEDINGS)
def test_beams_are_reordered_with_all_their_state(feeding):
    model, (ids, mask) = soft_model(attention_feeding=feeding), padded(sentences(4, 2, 5), 6)
    moved, reorder = [], EncoderDecoderCache.reorder_cache
    try:
        EncoderDecoderCache.reorder_cache = lambda self, beams: (moved.append(beams.tolist()), reorder(self, beams))
        found = generate(model, ids, mask, num_beams=4, return_dict_in_generate=True, output_scores=True)
    finally:
        EncoderDecoderCache.reorder_cache = reorder
    assert any(beams != sorted(beams) or len(set(beams)) < len(beams) for beams in moved[1:])
    for row in range(3):
        tokens = found.sequences[row : row + 1]
        logits = model(
            input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], decoder_input_ids=tokens[:, :-1]
        ).logits
        score = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).sum() / 7
        assert found.sequences_scores[row].item() == pytest.approx(score.item(), rel=1e-5)


@VARIANTS
@pytest.mark.parametrize("cut", [1, 3])
def test_a_target_in_two_forwards_equals_one(cut, changes):
    model, (ids, mask) = tiny_gnmt(**changes), padded(sentences(4, 2), 5, "left")
    target, target_mask = padded(sentences(6, 4, seed=1), 6, "left")
    options = {"attention_mask": mask, "use_cache": True}
    whole = model(input_ids=ids, decoder_input_ids=target, decoder_attention_mask=target_mask, **options)
    first = model(
        input_ids=ids, decoder_input_ids=target[:, :cut], decoder_attention_mask=target_mask[:, :cut], **options
    )
    assert first.past_key_values.get_seq_length() == cut
    encoded = (first.encoder_last_hidden_state,)
    second = model(
        encoder_outputs=encoded,
        decoder_input_ids=target[:, cut:],
        decoder_attention_mask=target_mask,
        past_key_values=first.past_key_values,
        **options,
    )
    real = target_mask.bool()
    assert_same(torch.cat([first.logits, second.logits], dim=1)[real], whole.logits[real])
    assert_same(states(second.past_key_values), states(whole.past_key_values))
    assert second.past_key_values.get_seq_length() == 6


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", ["greedy", "beams returned"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("feeding", FEEDINGS)
def test_batched_generation_equals_one_by_one(feeding, side, strategy, use_cache):
    model, sources = soft_model(attention_feeding=feeding), sentences(2, 5, 3)
    for extra in (0, 3):
        ids, mask = padded(sources, 5 + extra, side)
        together = generate(model, ids, mask, use_cache=use_cache, **STRATEGIES[strategy])
        alone = [generate(model, source[None], use_cache=use_cache, **STRATEGIES[strategy]) for source in sources]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_encoder_runs_once_and_with_a_cache_the_source_is_projected_once(use_cache, strategy):
    model, ids = tiny_gnmt(), torch.stack(sentences(4, 4))
    encoded, projected, lengths = [], [], []
    model.model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    attention = model.model.decoder.layers[0].attention
    project = attention.project_source
    attention.project_source = lambda source: (projected.append(1), project(source))[1]
    model.model.decoder.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, ids, use_cache=use_cache, max_new_tokens=5, **STRATEGIES[strategy])
    assert len(encoded) == 1
    assert len(projected) == (1 if use_cache else 5)
    assert lengths == ([1] * 5 if use_cache else [1, 2, 3, 4, 5])


def test_cross_attentions_are_returned_on_request():
    model, (ids, mask) = tiny_gnmt(), padded(sentences(4, 2), 5)
    output = generate(model, ids, mask, output_attentions=True, return_dict_in_generate=True)
    assert [[layer.shape for layer in step] for step in output.cross_attentions] == [[(2, 1, 1, 5)]] * 7
    weights = torch.cat([step[0] for step in output.cross_attentions], dim=2)
    assert_same(weights.sum(-1), torch.ones(2, 1, 7, dtype=torch.float64))
    assert weights[:, 0].masked_select(mask[:, None].eq(0)).eq(0).all() and weights[1, 0, :, 2:].eq(0).all()
    expected = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=output.sequences[:, :-1], output_attentions=True
    )
    assert_same(weights, expected.cross_attentions[0])


def test_the_encoder_computes_no_balancing_statistics_for_generate_even_in_training_mode():
    model, reports = tiny_gnmt().train(), []
    model.model.encoder.layers[2].register_forward_hook(lambda module, args, output: reports.extend(output[1:]))
    generate(model, torch.stack(sentences(3, 3)), num_beams=2)
    assert reports and set(reports) == {None}


@pytest.mark.parametrize("pattern", [["lstm", "moe", "lstm"], ["lstm", "lstm"]])
def test_a_cache_of_another_kind_is_refused(pattern):
    model, ids = tiny_gnmt(decoder_layer_pattern=pattern), torch.stack(sentences(3))
    for cache in (DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match=r"past_key_values=.*build it with EncoderDecoderCache\(Dyn"):
            model(input_ids=ids, decoder_input_ids=ids, past_key_values=cache)
    other = new_cache(tiny_gnmt(decoder_layer_pattern=["lstm"]))
    with pytest.raises(ValueError, match="cannot hold .* LSTM state"):
        model(input_ids=ids, decoder_input_ids=ids, past_key_values=other)


def test_a_cache_that_is_reset_serves_another_source():
    model, cache = tiny_gnmt(), new_cache(tiny_gnmt())
    first, second = (torch.stack(sentences(4, 4, seed=seed)) for seed in (0, 5))
    generate(model, first, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, second, past_key_values=cache), generate(model, second))


def test_a_forced_start_of_the_target_is_continued():
    model, ids, start = tiny_gnmt(), torch.stack(sentences(4, 4)), torch.tensor([[1, 7, 8], [1, 5, 9]])
    whole = generate(model, ids, decoder_input_ids=start)
    assert torch.equal(whole[:, :3], start)
    assert torch.equal(whole, generate(model, ids, decoder_input_ids=start, use_cache=False))
