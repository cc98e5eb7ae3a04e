"""generate() of the language model: with and without the cache, in one call or several, padded or alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import STRATEGIES, assert_same, padded, random_ids, tiny_lm
from transformers import DynamicCache, pipeline

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.models.moe import MoeBlock

PATTERNS = pytest.mark.parametrize(
    "changes",
    [{}, {"layer_pattern": ["moe", "lstm"]}, {"layer_pattern": ["lstm", "moe", "lstm"], "lstm_hidden_size": 12}],
    ids=["lstm first", "moe first", "projection"],
)


def generate(model, input_ids, attention_mask=None, **kwargs):
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(input_ids, attention_mask=attention_mask, **settings)


def states(cache):
    return [tensor for layer in cache.layers if hasattr(layer, "state") for tensor in layer.state]


@PATTERNS
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_does_not_change_what_is_generated(strategy, changes):
    model, input_ids = tiny_lm(**changes), random_ids(3, 4)
    cached = generate(model, input_ids, use_cache=True, **STRATEGIES[strategy])
    uncached = generate(model, input_ids, use_cache=False, **STRATEGIES[strategy])
    assert torch.equal(cached, uncached)
    assert cached.shape == (3 * STRATEGIES[strategy].get("num_return_sequences", 1), 10)
    assert len({tuple(row) for row in cached[:, 4:].tolist()}) > 1


@settings(deadline=None, max_examples=8)
@given(cut=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_sequence_in_two_forwards_equals_one(cut, seed):
    model, input_ids = tiny_lm(seed=seed), random_ids(2, 7, seed)
    whole = model(input_ids, use_cache=True)
    first = model(input_ids[:, :cut], use_cache=True)
    assert first.past_key_values.get_seq_length() == cut
    second = model(input_ids[:, cut:], past_key_values=first.past_key_values)
    assert_same(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    assert_same(states(second.past_key_values), states(whole.past_key_values))
    assert second.past_key_values.get_seq_length() == 7


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_gradients_flow_through_a_carried_state_until_it_is_detached(use_reentrant):
    model, input_ids = tiny_lm(gating="softmax_top_k").train(), random_ids(2, 6)
    model(input_ids).logits[:, 3:].sin().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for detach in (False, True):
        model.zero_grad()
        first = model(input_ids[:, :3], use_cache=True)
        if detach:
            for layer in (0, 2):
                first.past_key_values.layers[layer].detach()
        second = model(input_ids[:, 3:], past_key_values=first.past_key_values)
        second.logits.sin().sum().backward()
        actual = {name: parameter.grad for name, parameter in model.named_parameters()}
        if not detach:
            assert_same(actual, expected)
    before = list(set(input_ids[:, :3].flatten().tolist()) - set(input_ids[:, 3:].flatten().tolist()))
    embedding = "model.embed_tokens.weight"
    assert before and expected[embedding][before].abs().min() > 0
    assert actual[embedding][before].abs().max() == 0


@PATTERNS
def test_generation_in_two_calls_equals_one(changes):
    model, (input_ids, mask) = tiny_lm(**changes), padded([random_ids(1, 2)[0], random_ids(1, 4)[0]], 4, "left")
    whole = generate(model, input_ids, mask, max_new_tokens=7)
    cache = DynamicCache(config=model.config)
    first = generate(model, input_ids, mask, max_new_tokens=3, past_key_values=cache)
    longer_mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    second = generate(model, first, longer_mask, max_new_tokens=4, past_key_values=cache)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax_top_k"])
@pytest.mark.parametrize("side", ["left", "right"])
@settings(deadline=None, max_examples=6)
@given(padding=st.integers(1, 6), length=st.integers(2, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(gating, side, padding, length, seed):
    model, prompt = tiny_lm(seed=seed, gating=gating, lstm_hidden_size=12), random_ids(1, length, seed)
    counts = []
    hooks = [layer for layer in model.model.layers if isinstance(layer, MoeBlock)]
    hooks[0].register_forward_hook(lambda module, args, output: counts.append(output[3].tolist()))
    ids, mask = padded(prompt, length + padding, side)
    expected = model(prompt, labels=prompt, use_cache=True)
    actual = model(ids, attention_mask=mask, labels=ids, use_cache=True)
    assert_same(actual.logits[mask.bool()], expected.logits[0])
    assert_same(states(actual.past_key_values), states(expected.past_key_values))
    assert_same(actual.loss, expected.loss, rtol=1e-6)
    assert_same(actual.aux_loss, expected.aux_loss)
    assert counts[0] == counts[1] and sum(counts[0]) == 2 * length


def test_rows_of_a_padded_batch_equal_each_row_alone():
    model = tiny_lm()
    prompts = [random_ids(1, length, seed=length)[0] for length in (2, 5, 3)]
    for side in ("left", "right"):
        ids, mask = padded(prompts, 6, side)
        batch = model(ids, attention_mask=mask, use_cache=True)
        for row, prompt in enumerate(prompts):
            alone = model(prompt[None], use_cache=True)
            assert_same(batch.logits[row, mask[row].bool()], alone.logits[0])
            for together, single in zip(states(batch.past_key_values), states(alone.past_key_values)):
                assert_same(together[row], single[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", ["greedy", "beam search"])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_batched_generation_equals_one_by_one(extra, strategy, use_cache):
    model = tiny_lm()
    prompts = [random_ids(1, length, seed=length)[0] for length in (2, 5, 3)]
    ids, mask = padded(prompts, 5 + extra, "left")
    batch = generate(model, ids, mask, use_cache=use_cache, **STRATEGIES[strategy])
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], use_cache=use_cache, **STRATEGIES[strategy])
        assert torch.equal(batch[row, 5 + extra :], alone[0, len(prompt) :])


def test_a_step_reads_one_token_and_the_state_does_not_grow():
    model, lengths = tiny_lm(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    sizes = set()
    for context in (3, 12):
        lengths.clear()
        cache = DynamicCache(config=model.config)
        generate(model, random_ids(2, context), max_new_tokens=5, past_key_values=cache)
        assert lengths == [context, 1, 1, 1, 1]
        sizes.add(tuple(tensor.untyped_storage().nbytes() for tensor in states(cache)))
    assert len(sizes) == 1


@pytest.mark.parametrize("changes", [{}, {"layer_pattern": ["moe", "lstm"]}])
def test_a_cache_that_was_not_built_from_the_config_is_refused(changes):
    with pytest.raises(ValueError, match=r"past_key_values=DynamicCache.*DynamicCache\(config=model.config\)"):
        tiny_lm(**changes)(random_ids(2, 3), past_key_values=DynamicCache())


def test_generation_from_embeddings_equals_generation_from_ids():
    model, input_ids = tiny_lm(), random_ids(2, 4)
    expected = generate(model, input_ids)[:, 4:]
    embeds = model.get_input_embeddings()(input_ids)
    mask = torch.ones_like(input_ids)
    new = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(new, expected)


def test_the_text_generation_pipeline_continues_a_batch_of_prompts():
    tokenizer = train_tokenizer(["the cat sat on the mat", "a dog ate the cat"], kind="word", vocab_size=23)
    model = tiny_lm(torch.float32, vocab_size=len(tokenizer))
    prompts = ["the cat", "a dog ate the"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_full_text": False}
    together = [row[0]["generated_text"] for row in generator(prompts, batch_size=2, **options)]
    for prompt, text in zip(prompts, together):
        assert generator(prompt, **options)[0]["generated_text"] == text
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = generate(model, input_ids, max_new_tokens=4, min_new_tokens=4, eos_token_id=0)
        assert text == tokenizer.decode(generated[0, input_ids.shape[1] :], skip_special_tokens=True) != ""
