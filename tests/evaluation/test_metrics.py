"""Our `evaluate` metrics load without the network and give the numbers worked out by hand."""

import math
import socket
import sys

import pytest
import sacrebleu

from moe_hf.errors import InputError
from moe_hf.evaluation.metrics import load_metric


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a metric went to the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def perplexity():
    return load_metric("stream_perplexity")


def test_perplexity_of_one_part(perplexity):
    # 8 tokens at probability 1/2 in 4 words: 2 bits a word.
    values = perplexity.compute(nll=[8 * math.log(2)], num_tokens=[8], num_words=[4])
    assert values == pytest.approx(
        {"perplexity_per_token": 2, "perplexity_per_word": 4, "bits_per_word": 2}, rel=1e-12
    )


def test_perplexity_of_parts_is_that_of_the_whole(perplexity):
    perplexity.add(nll=3.0, num_tokens=2, num_words=1)
    perplexity.add_batch(nll=[1.0, 6.0], num_tokens=[3, 5], num_words=[2, 4])
    values = perplexity.compute()
    assert values["perplexity_per_token"] == pytest.approx(math.exp(10 / 10), rel=1e-12)
    assert values["perplexity_per_word"] == pytest.approx(math.exp(10 / 7), rel=1e-12)
    assert values["bits_per_word"] == pytest.approx(10 / 7 / math.log(2), rel=1e-12)


def test_huge_loss_is_an_infinite_perplexity_and_nan_stays_nan(perplexity):
    assert perplexity.compute(nll=[1e6], num_tokens=[1], num_words=[1])["perplexity_per_token"] == math.inf
    values = perplexity.compute(nll=[math.nan], num_tokens=[1], num_words=[1])
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize(("num_tokens", "num_words"), [(0, 1), (1, 0)])
def test_nothing_to_score_is_an_error(perplexity, num_tokens, num_words):
    with pytest.raises(ValueError, match=f"num_tokens sums to {num_tokens} and num_words to {num_words}"):
        perplexity.compute(nll=[0.0], num_tokens=[num_tokens], num_words=[num_words])


@pytest.mark.parametrize(
    ("metric", "package"),
    [("stream_perplexity", "evaluate"), ("sacrebleu_metrics", "evaluate"), ("sacrebleu_metrics", "sacrebleu")],
)
def test_a_missing_package_is_named_with_its_extra_and_its_folder(metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=rf"^the package '{package}' is missing.* pip install '\.\[eval\]' in a checkout"
    ):
        load_metric(metric)


@pytest.fixture
def translation():
    return load_metric("sacrebleu_metrics")


def test_bleu_is_that_of_its_definition(translation):
    # Tokens: Ein Hund läuft durch das Gras . against the same with "grüne" before "Gras": 7 against 8.
    values = translation.compute(
        predictions=["Ein Hund läuft durch das Gras."], references=["Ein Hund läuft durch das grüne Gras."]
    )
    precisions = [7 / 7, 5 / 6, 3 / 5, 2 / 4]
    expected = 100 * math.exp(1 - 8 / 7) * math.prod(precisions) ** 0.25
    assert values["bleu"] == pytest.approx(expected, rel=1e-9)


def test_translations_are_scored_with_and_without_case(translation):
    references = ["Zwei Männer stehen am Herd.", "Ein Kind (im Pool) lacht laut."]
    assert translation.compute(predictions=references, references=references) == {
        "bleu": pytest.approx(100),
        "bleu_signature": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
        "bleu_lowercase": pytest.approx(100),
        "bleu_lowercase_signature": f"nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
        "chrf": pytest.approx(100),
        "chrf_signature": f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}",
    }
    lower = translation.compute(predictions=[text.lower() for text in references], references=references)
    assert lower["bleu_lowercase"] == pytest.approx(100)
    assert lower["bleu"] < 60


REFERENCES_ZH = ["我喜欢在公园里散步。", "他昨天去了北京。", "今天天气很好，我们去吃饭吧。"]
TRANSLATIONS_ZH = ["我喜欢在公园散步。", "他昨天去了北京。", "今天天气好，我们去吃饭。"]


def test_a_language_without_spaces_is_scored_with_its_own_tokenizer(translation):
    by_spaces = translation.compute(predictions=TRANSLATIONS_ZH, references=REFERENCES_ZH)
    assert by_spaces["bleu"] == 0
    # By hand: runs of one to four signs that the references have too, and 29 signs where they have 32.
    expected = 100 * math.exp(1 - 32 / 29) * (29 / 29 * 23 / 26 * 18 / 23 * 13 / 20) ** 0.25
    for name in ("zh", "char"):
        values = translation.compute(predictions=TRANSLATIONS_ZH, references=REFERENCES_ZH, tokenize=name)
        assert values["bleu"] == pytest.approx(expected, rel=1e-9) and round(values["bleu"], 2) == 73.85
        assert values["bleu_lowercase"] == values["bleu"]
        assert f"|tok:{name}|" in values["bleu_signature"] and f"|tok:{name}|" in values["bleu_lowercase_signature"]
        assert values["chrf"] == by_spaces["chrf"]


def test_an_unknown_tokenizer_is_named(translation):
    with pytest.raises(InputError, match="tokenize='moses' is not known, use one of none, zh, 13a, intl, char"):
        translation.compute(predictions=["a"], references=["a"], tokenize="moses")


def test_an_empty_translation_lowers_the_score(translation):
    references = ["Zwei Männer stehen am Herd."] * 2
    values = translation.compute(predictions=[references[0], ""], references=references)
    assert 0 < values["bleu"] < 50


@pytest.mark.parametrize(("predictions", "references"), [(["a"], ["a", "b"]), (["a", "b"], ["a"]), (["a"], [])])
def test_missing_translations_are_an_error(translation, predictions, references):
    message = f"{len(predictions)} predictions for {len(references)} references"
    with pytest.raises(InputError, match=message):
        translation.compute(predictions=predictions, references=references)


def test_no_translation_is_an_error(translation):
    with pytest.raises(InputError, match="empty, at least one"):
        translation.compute(predictions=[], references=[])
