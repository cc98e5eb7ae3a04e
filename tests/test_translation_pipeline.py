"""`moe_hf.pipeline("translation", ...)` against `Translator`: the same texts, Transformers 4's arguments, refusals."""

import pytest
import torch
from tiny_models import tiny_gnmt

import moe_hf
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.translator import Translator

LINES = ["a dog", "the black cat sees two dogs and a bird", "", "two birds", "   ", "a cat sees the dog", "a dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_translation_tokenizer(LINES, vocab_size=290, languages=["de", "fr"])


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, with weights large enough that translations differ, and end."""
    return tiny_gnmt(vocab_size=len(tokenizer), gating="softmax_top_k", std=0.5)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def expected(model, tokenizer, language, **arguments):
    found = Translator(model, tokenizer, language, **arguments).translate(LINES)
    return [{"translation_text": one[0].text} for one in found]


def test_a_folder_translates_into_the_language_of_the_task(model, tokenizer, folder):
    translate = moe_hf.pipeline("translation_en_to_fr", model=folder)
    translate.model.to(torch.float64).set_experts_implementation("eager")
    assert translate(LINES) == expected(model, tokenizer, "fr")
    assert translate(LINES[0]) == expected(model, tokenizer, "fr")[:1]
    several = translate(LINES[:2], num_beams=3, num_return_sequences=2)
    assert [len(found) for found in several] == [2, 2]
    with pytest.raises(ValueError, match="model=None"):
        moe_hf.pipeline("translation")


def test_other_pipelines_are_the_librarys(monkeypatch):
    monkeypatch.setattr("transformers.pipeline", lambda task, **arguments: (task, arguments))
    assert moe_hf.pipeline("text-generation", model="x", top_k=5) == (
        "text-generation",
        {"model": "x", "tokenizer": None, "top_k": 5},
    )


def test_the_arguments_of_transformers_4(model, tokenizer):
    wanted = expected(model, tokenizer, "fr", max_length=6)
    assert wanted != expected(model, tokenizer, "fr") and wanted != expected(model, tokenizer, "de", max_length=6)
    options = {"src_lang": "en", "tgt_lang": "fr", "batch_size": 2, "max_length": 6}
    assert moe_hf.pipeline("translation", model, tokenizer, **options)(LINES) == wanted
    assert moe_hf.pipeline("translation", model, tokenizer)(LINES, **options) == wanted
    assert moe_hf.pipeline("translation_en_to_de", model, tokenizer, **options)(LINES) == wanted
    assert moe_hf.pipeline("translation", model, tokenizer, target_language="de")(LINES, **options) == wanted


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto", None], ids=str)
def test_a_model_given_by_name_is_loaded_in_the_dtype_asked_for(folder, name, dtype):
    translate = moe_hf.pipeline("translation", folder, tgt_lang="de", device="cpu", **{name: dtype})
    assert translate.model.dtype == (torch.float64 if dtype in ("auto", None) else torch.bfloat16)
    assert len(translate(LINES)) == len(LINES)


def test_what_cannot_be_used_is_named(model, tokenizer):
    with pytest.raises(TypeError, match="unexpected arguments: num_beam, truncation$"):
        moe_hf.pipeline("translation", model, tokenizer, truncation=True, num_beam=3, num_beams=3)
    with pytest.raises(TypeError, match="unexpected arguments: num_beam$"):
        moe_hf.pipeline("translation", model, tokenizer)("a dog", num_beam=3)
    with pytest.raises(ValueError, match="target_language='de' and tgt_lang='fr' differ"):
        moe_hf.pipeline("translation", model, tokenizer, target_language="de", tgt_lang="fr")
    with pytest.raises(ValueError, match="dtype=torch.bfloat16 is only for a model given by name"):
        moe_hf.pipeline("translation", model, tokenizer, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        moe_hf.pipeline("translation", model, tokenizer, tgt_lang="de")("a dog", batch_size=0)
    with pytest.raises(ValueError, match="target_language='cs' is unknown"):
        moe_hf.pipeline("translation", model, tokenizer, tgt_lang="cs")("a dog")
