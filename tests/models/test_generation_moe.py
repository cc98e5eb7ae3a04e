"""Options of generate() for both families: kinds of caches, filled caches, stop strings, and refusals."""

import pytest
import torch
from tiny_models import GNMT, LM, padded, sentences, tiny_gnmt, tiny_lm
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.generation import gnmt_beam_search
from moe_hf.models.cache import CACHE_NAME, LstmCacheLayer, cache_of

FAMILIES = pytest.mark.parametrize("models", [LM, GNMT], ids=["lm", "gnmt"])
SEARCHES = pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
IDS = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 6, 10, 3, 12, 4]])
TEXTS = ["the cat sat on the mat", "a dog ate the cat", "the dog sat"]


def generate(model, ids=IDS, **kwargs):
    torch.manual_seed(0)
    return model.generate(ids, **({"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | kwargs))


def new_cache(model, kind=DynamicCache, **sizes):
    caches = [kind(config=model.config, **sizes) for _ in range(1 + model.config.is_encoder_decoder)]
    return EncoderDecoderCache(*caches) if model.config.is_encoder_decoder else caches[0]


def continue_from(model, text, **kwargs):
    """Calls generate() after `text`: a language model's prompt, or the start of a translation."""
    if model.config.is_encoder_decoder:
        return generate(model, decoder_input_ids=text, **kwargs)
    return generate(model, text, **kwargs)


@SEARCHES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_chunks_gives_the_same_tokens(search, cache):
    model, mask = tiny_lm(), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, **search}
    found = generate(model, **options, prefill_chunk_size=4, cache_implementation=cache)
    assert torch.equal(found, generate(model, **options))


def test_chunks_are_refused_for_a_translation():
    with pytest.raises(ValueError, match="prefill_chunk_size=2 is for the prompt of a language model"):
        generate(tiny_gnmt(), prefill_chunk_size=2)


@FAMILIES
@SEARCHES
def test_a_static_cache_gives_the_same_tokens(models, search):
    model = models.model()
    expected = generate(model, **search)
    for name in ("static", "dynamic"):
        assert torch.equal(generate(model, **search, cache_implementation=name), expected)
    cache = new_cache(model, StaticCache, max_cache_len=40)
    assert torch.equal(generate(model, **search, **{CACHE_NAME: cache}), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


@FAMILIES
def test_a_quantized_or_paged_cache_is_refused(models):
    model = models.model()
    with pytest.raises(ValueError, match=r"(?i)quantized ?cache"):
        generate(model, cache_implementation="quantized")
    for call in (lambda: generate(model, cache_implementation="paged"), lambda: model.generate_batch(IDS.tolist())):
        with pytest.raises(ValueError, match=r"generate_batch .* call generate\(\) with a padded batch") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_offloading_leaves_the_state_where_a_forward_reads_it():
    layer = LstmCacheLayer()
    layer.update(torch.ones(2, 3, device="meta"), torch.ones(2, 3, device="meta"))  # as if on an accelerator
    layer.offload()
    assert all(part.device.type == "meta" for part in layer.state)
    layer.prefetch()
    assert all(part.device.type == "meta" for part in layer.state)


@FAMILIES
@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_generation_is_refused_in_one_line(models, option):
    model = models.model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models") as caught:
        generate(model, IDS[:1], **{option: model if option == "assistant_model" else 2})
    assert "\n" not in str(caught.value)
    assert not new_cache(model).is_croppable


@pytest.mark.parametrize("of_library", [False, True])
def test_encoder_outputs_are_computed_once_and_searched_several_times(of_library):
    model = tiny_gnmt()
    ids, mask = padded(sentences(4, 2), 5)
    searches = [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "custom_generate": gnmt_beam_search},
        {"do_sample": True, "num_return_sequences": 2},
    ]
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    before = encoded.last_hidden_state.clone()
    given = BaseModelOutput(before.clone()) if of_library else encoded
    for search in [*searches, *searches]:
        expected = generate(model, ids, attention_mask=mask, **search)
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | search
        found = model.generate(encoder_outputs=given, attention_mask=mask, **options)
        assert torch.equal(found, expected)
        assert torch.equal(given.last_hidden_state, before)


@FAMILIES
@SEARCHES
def test_a_filled_cache_goes_on_from_the_whole_text(models, search):
    model = models.model()
    start = torch.tensor([[1, 7, 8, 5], [1, 5, 9, 6]])
    whole = continue_from(model, start, **search)
    cache = new_cache(model)
    first = continue_from(model, start[:, :2], max_new_tokens=1, **{CACHE_NAME: cache})
    assert first.shape[1] == 3 and cache.get_seq_length() == 2
    if search:
        cache.batch_repeat_interleave(3)
    assert torch.equal(continue_from(model, start, **{CACHE_NAME: cache}, **search), whole)


def test_a_filled_cache_goes_on_from_new_tokens_under_a_mask_of_the_whole_text():
    model, start = tiny_lm(), torch.tensor([[1, 7, 8, 5], [1, 5, 9, 6]])
    cache = new_cache(model)
    generate(model, start[:, :2], max_new_tokens=1, **{CACHE_NAME: cache})
    found = generate(model, start[:, 2:], attention_mask=torch.ones_like(start), **{CACHE_NAME: cache})
    assert torch.equal(found[:, 2:], generate(model, start)[:, 4:])


@FAMILIES
def test_new_tokens_alone_are_refused_and_the_message_says_what_to_give(models):
    model, cache = models.model(), new_cache(models.model())
    start = torch.tensor([[1, 7, 8, 5], [1, 5, 9, 6]])
    continue_from(model, start, max_new_tokens=1, **{CACHE_NAME: cache})
    requests = [(start[:, :1], {}), (start[:, :2], {}), (start, {})]
    if model.config.is_encoder_decoder:
        requests.append((start[:, :1], {"decoder_attention_mask": torch.ones(2, 5, dtype=torch.long)}))
    for new, options in requests:
        message = f"input_ids has {new.shape[1]} tokens, {CACHE_NAME} has seen 4 already: give the whole text"
        with pytest.raises(ValueError, match=message) as caught:
            continue_from(model, new, **{CACHE_NAME: cache}, **options)
        assert "\n" not in str(caught.value)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(("models", "custom"), [(LM, None), (GNMT, None), (GNMT, gnmt_beam_search)])
def test_a_filled_cache_of_other_rows_is_refused(models, custom):
    model, cache = models.model(), new_cache(models.model())
    start = torch.tensor([[1, 7, 8, 5], [1, 5, 9, 6]])
    continue_from(model, start[:, :2], max_new_tokens=1, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"{CACHE_NAME} keeps the state of 2 rows, generate.. needs 6") as caught:
        continue_from(model, start, num_beams=3, custom_generate=custom, **{CACHE_NAME: cache})
    assert f"{CACHE_NAME}.batch_repeat_interleave(num_beams)" in str(caught.value) and "\n" not in str(caught.value)


@FAMILIES
def test_the_cache_of_a_search_is_returned(models):
    model = models.model()
    for search in ({}, {"num_beams": 2}):
        found = generate(model, return_dict_in_generate=True, **search)
        assert cache_of(found).get_seq_length() == found.sequences.shape[1] - 1


@pytest.mark.parametrize("kind", ["word", "bpe", "translation"])
def test_a_stop_string_ends_the_text_as_soon_as_it_is_complete(kind):
    if kind == "translation":
        tokenizer = train_translation_tokenizer(TEXTS, vocab_size=290)
        model = tiny_gnmt(torch.float32, vocab_size=len(tokenizer))
    else:
        tokenizer = train_tokenizer(TEXTS, kind=kind, vocab_size=23 if kind == "word" else 290)
        model = tiny_lm(torch.float32, vocab_size=len(tokenizer))
    other = [index for index, text in enumerate(map(tokenizer.decode, range(len(tokenizer)))) if not text.isalpha()]
    options = {**tokenizer("the dog", return_tensors="pt"), "do_sample": False, "eos_token_id": None}
    options |= {"max_new_tokens": 9, "suppress_tokens": other, "repetition_penalty": 9.0}
    free = model.generate(**options)[0]
    text = tokenizer.decode(free[:-2], skip_special_tokens=True)
    stop = text[-4:]
    assert text.count(stop) == 1
    stopped = model.generate(**options, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert torch.equal(stopped, free[:-2])


def test_token_healing_without_a_bos_token_is_refused_in_one_line():
    tokenizer = train_tokenizer(TEXTS, kind="word", vocab_size=23)
    model = tiny_lm(torch.float32, vocab_size=len(tokenizer))
    inputs = tokenizer("the dog", return_tensors="pt")
    with pytest.raises(ValueError, match="token_healing=True needs a tokenizer with a bos_token") as caught:
        model.generate(**inputs, token_healing=True, tokenizer=tokenizer, max_new_tokens=2)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, token_healing=True, max_new_tokens=2)
