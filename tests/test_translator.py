"""Translating lines: order, independence of the batch, empty lines, scores, and several results per line."""

import logging

import pytest
import torch
from pictures import is_drawn
from tiny_models import tiny_gnmt

from moe_hf.data.translation_tokenizers import encode_sources, train_translation_tokenizer
from moe_hf.errors import InputError
from moe_hf.evaluation.attention_plot import plot_attention
from moe_hf.translator import Translator

LINES = ["a dog", "the black cat sees two dogs and a bird", "", "two birds", "   ", "a cat sees the dog", "a dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_translation_tokenizer(LINES, vocab_size=290, languages=["de", "fr"])


@pytest.fixture(scope="module")
def single():
    return train_translation_tokenizer(LINES, vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, with weights large enough that translations differ, and end."""
    return tiny_gnmt(vocab_size=len(tokenizer), gating="softmax_top_k", std=0.5)


def texts(results):
    return [[one.text for one in found] for found in results]


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 3, "length_alpha": 0.4}])
def test_results_come_in_the_order_of_the_lines_whatever_the_batches(model, tokenizer, arguments):
    arguments = {"with_scores": True} | arguments
    together = list(Translator(model, tokenizer, "de", **arguments).translate(LINES))
    apart = list(Translator(model, tokenizer, "de", tokens_per_batch=1, **arguments).translate(LINES))
    portions = list(Translator(model, tokenizer, "de", buffer_lines=2, **arguments).translate(iter(LINES)))
    assert len(together) == len(LINES) and texts(together) == texts(apart) == texts(portions)
    assert len({found[0].text for found in together}) > 2
    for found, other in zip(together, apart):
        assert found[0].score == pytest.approx(other[0].score, rel=1e-6)
    assert together[0] == together[-1]


def test_an_empty_line_gives_an_empty_translation(model, tokenizer):
    results = list(Translator(model, tokenizer, "fr", num_beams=2, num_return_sequences=2).translate(LINES))
    assert texts(results)[2] == texts(results)[4] == ["", ""]
    assert list(Translator(model, tokenizer, "fr").translate([])) == []


def test_the_language_decides(model, tokenizer):
    german, french = (texts(Translator(model, tokenizer, name).translate(LINES)) for name in ("de", "fr"))
    assert german != french


def test_greedy_score_is_the_log_probability(model, tokenizer):
    (found,) = list(Translator(model, tokenizer, "de", with_scores=True).translate(["two birds"]))[0]
    assert found.source_ids == encode_sources(tokenizer, ["two birds"], "de")[0]
    labels = torch.tensor([found.target_ids])
    loss = model(input_ids=torch.tensor([found.source_ids]), labels=labels).loss
    assert found.score == pytest.approx(-loss.item() * labels.shape[1], rel=1e-6)


def test_a_translation_that_does_not_end_is_cut_at_its_own_limit(model, tokenizer):
    translator = Translator(model, tokenizer, "de", max_length_ratio=1.0, suppress_tokens=[tokenizer.eos_token_id])
    for beams in (1, 3):
        translator.generate_arguments["num_beams"] = beams
        for line, found in zip(LINES, translator.translate(LINES)):
            if line.strip():
                assert len(found[0].target_ids) == len(found[0].source_ids) + 10


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_folders_output_length_cuts_nothing_and_a_callers_does(single, caplog, monkeypatch, name, beams):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that its warnings are seen here
    model = tiny_gnmt(vocab_size=len(single), gating="softmax_top_k", std=0.5)
    options = {"num_beams": beams, "with_scores": True, "suppress_tokens": [single.eos_token_id]}  # no end
    expected = list(Translator(model, single, **options).translate(LINES))
    setattr(model.generation_config, name, 4)
    with caplog.at_level("WARNING", logger="transformers"):
        assert list(Translator(model, single, **options).translate(LINES)) == expected
        short = list(Translator(model, single, **options, **{name: 7}).translate(LINES))
    assert not caplog.records
    for found, whole, line in zip(short, expected, LINES):
        assert len(found[0].target_ids) == ((7 if name == "max_new_tokens" else 6) if line.strip() else 0)
        if beams == 1:
            assert found[0].target_ids == whole[0].target_ids[: len(found[0].target_ids)]


def test_batches_have_at_most_as_many_sources_as_told(model, tokenizer):
    sizes = []
    translator = Translator(model, tokenizer, "de", batch_size=2)
    found = translator.translate_ids([[5, 6, 2]] * 5, on_batch=sizes.append)
    assert sizes == [2, 2, 1] and len(found) == 5
    assert found == Translator(model, tokenizer, "de").translate_ids([[5, 6, 2]] * 5)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 3, "length_alpha": 0.2}])
def test_without_scores_no_steps_logits_are_kept(model, tokenizer, monkeypatch, arguments):
    outputs, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: outputs.append(generate(**options)) or outputs[-1])
    (found,) = list(Translator(model, tokenizer, "de", **arguments).translate(["two birds"]))[0]
    assert found.text and found.score is None
    assert outputs[0].get("scores") is None


def test_greedy_scores_keep_no_logits_either(model, tokenizer, monkeypatch):
    outputs, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: outputs.append(generate(**options)) or outputs[-1])
    found = list(Translator(model, tokenizer, "de", with_scores=True).translate(LINES[:2]))
    assert all(one[0].score < 0 for one in found) and outputs[0].get("scores") is None


def test_what_the_checkpoint_says_of_the_search_counts(single):
    model = tiny_gnmt(vocab_size=len(single), gating="softmax_top_k", std=0.5)
    expected = list(Translator(model, single, num_beams=3, num_return_sequences=2).translate(LINES))
    model.generation_config.num_beams, model.generation_config.num_return_sequences = 3, 2
    translator = Translator(model, single, tokens_per_batch=60)
    assert list(translator.translate(LINES)) == expected
    assert max(map(len, translator._batches([4] * 20))) == 60 // (4 * 3)
    greedy = Translator(model, single, num_beams=1, num_return_sequences=1)
    assert [len(found) for found in greedy.translate(LINES)] == [1] * len(LINES)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 3, "length_alpha": 0.2}])
def test_no_special_token_stands_in_a_translation(tokenizer, arguments):
    special = set(tokenizer.all_special_ids)
    others, seen = special - {tokenizer.eos_token_id}, {False: 0, True: 0}
    for seed in range(2):
        model = tiny_gnmt(vocab_size=len(tokenizer), seed=seed, gating="softmax_top_k", std=0.5)
        likely = model(input_ids=torch.tensor([[7, 8, 2]]), labels=torch.tensor([[9, 10, 11]])).logits.mean(dim=(0, 1))
        model.lm_head.weight.data[list(others)] = model.lm_head.weight[likely.argmax()].clone()
        for allowed in (False, True):
            options = arguments | ({"suppress_tokens": []} if allowed else {})
            found = Translator(model, tokenizer, "de", **options).translate(LINES)
            seen[allowed] += sum(not others.isdisjoint(one[0].target_ids) for one in found)
    assert seen[False] == 0 < seen[True]


def test_several_results_are_ranked(model, tokenizer):
    arguments = {"num_beams": 4, "num_return_sequences": 3, "with_scores": True}
    results = list(Translator(model, tokenizer, "de", **arguments).translate(LINES))
    for found in results:
        scores = [one.score for one in found]
        assert len(found) == 3 and scores == sorted(scores, reverse=True)


def test_gnmt_score_is_plugged_in(model, tokenizer):
    def best(**arguments):
        arguments = {"num_beams": 3, "max_length_ratio": 0.0, "with_scores": True} | arguments
        translator = Translator(model, tokenizer, "de", **arguments)
        return list(translator.translate([LINES[1]]))[0][0]

    gnmt = best(length_alpha=0.0)
    labels = torch.tensor([gnmt.target_ids])
    loss = model(input_ids=torch.tensor([gnmt.source_ids]), labels=labels).loss
    assert gnmt.score == pytest.approx(-loss.item() * labels.shape[1], rel=1e-6)
    assert best(coverage_beta=0.5).score < gnmt.score


def test_attention_of_a_translation(model, tokenizer, tmp_path):
    translator = Translator(model, tokenizer, "de")
    (found,) = list(translator.translate(["the black cat"]))[0]
    weights = translator.attention(found)
    assert weights.shape == (len(found.target_ids), len(found.source_ids))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))
    plot_attention(translator, found, tmp_path / "attention.png")
    assert is_drawn(tmp_path / "attention.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch=0 must be at least 1"),
        ({"buffer_lines": 0}, "buffer_lines=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"target_language": "cs"}, "target_language='cs' is unknown.*de, fr"),
        ({"target_language": None}, "target_language is not given.*de, fr"),
        ({"max_length_ratio": -1.0}, "max_length_ratio=-1.0 must be a number of at least 0"),
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"num_beams": 2, "num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 exceeds num_beams=2"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 exceeds num_beams=1"),
        ({"num_beams": 2, "length_alpha": -1.0}, "length_alpha=-1.0 must be at least 0"),
        ({"num_beams": 2, "length_alpha": float("nan")}, "length_alpha=nan must be"),
        ({"num_beams": 2, "coverage_beta": float("inf")}, "coverage_beta=inf must be"),
        ({"num_beams": 2, "coverage_beta": 1e30}, "coverage_beta=1e.30 must be at least 0 and at most 10"),
        ({"num_beams": 2, "length_penalty": -1e30}, "length_penalty=-1e.30 must be at least -10 and at most 10"),
        ({"num_beams": "two"}, "num_beams='two' must be a whole number"),
        ({"num_beams": 2.5}, "num_beams=2.5 must be a whole number"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x' must be a whole number"),
        ({"batch_size": "x"}, "batch_size='x' must be a whole number"),
        ({"max_length_ratio": "x"}, "max_length_ratio='x' must be a number"),
        ({"length_alpha": 0.2}, "length_alpha=0.2 needs num_beams of at least 2, got 1"),
        ({"num_beams": 2, "coverage_beta": 0.2, "length_penalty": 0.0}, "length_penalty=0.0 .*coverage_beta=0.2"),
        ({"num_beams": 2, "length_alpha": 0.2, "do_sample": True}, "do_sample=True .*length_alpha=0.2"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, arguments, named):
    with pytest.raises(InputError, match=named):
        list(Translator(model, tokenizer, **({"target_language": "de"} | arguments)).translate([""]))


def test_a_line_that_is_not_text_is_named(model, tokenizer):
    with pytest.raises(InputError, match="lines: None is not text"):
        list(Translator(model, tokenizer, "de").translate(["a dog", None]))
    with pytest.raises(InputError, match="lines='a dog' is one text, give a list"):
        list(Translator(model, tokenizer, "de").translate("a dog"))


def test_the_old_name_of_tokens_per_batch_works_and_warns(model, tokenizer):
    with pytest.warns(DeprecationWarning, match="batch_tokens of Translator is now called tokens_per_batch"):
        assert Translator(model, tokenizer, "de", batch_tokens=60).tokens_per_batch == 60
    with pytest.raises(InputError, match="batch_tokens .* is now called .*; give only tokens_per_batch=8000"):
        Translator(model, tokenizer, "de", batch_tokens=60, tokens_per_batch=8000)
