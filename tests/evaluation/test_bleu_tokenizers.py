"""BLEU uses the tokenizer of the target language or a chosen tokenizer; the signature names the tokenizer."""

import json
import re
import sys

import pytest
import sacrebleu
from tiny_runs import TRANSLATION_CONFIG, write_translation_config

from moe_hf.commands import evaluate_translation as command
from moe_hf.data.pair_sources import PairSource
from moe_hf.data.sentence_pairs import load_sentence_pairs
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.errors import InputError
from moe_hf.evaluation.bleu_tokenizers import check_tokenizer, language_of_file, merge_signatures, tokenizer_for
from moe_hf.evaluation.held_out_pairs import evaluation_pairs
from moe_hf.evaluation.translation_model import evaluate_translation
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.translation import train_translation
from moe_hf.training.translation_trainer import score_translations
from tests.evaluation.test_metrics import REFERENCES_ZH, TRANSLATIONS_ZH
from tests.training.test_translation import CLASSES

SOURCES = ["i like to walk in the park", "he went to beijing", "the weather is good, let us eat"]
GERMAN = ["ich gehe gern im Park", "er fuhr nach Peking", "das Wetter ist gut, lass uns essen"]


@pytest.fixture
def without_mecab(monkeypatch):
    for language in ("ja", "ko"):
        module = __import__(f"sacrebleu.tokenizers.tokenizer_{language}_mecab", fromlist=["MeCab"])
        monkeypatch.setattr(module, "MeCab", None)


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("zh", "zh"), ("zh-CN", "zh"), ("zh_TW", "zh"), ("zho_Hans", "zh"), ("th", "char"), ("lo", "char"),
        ("km", "char"), ("my", "char"), ("de", "13a"), ("zhuang", "13a"), (None, "13a"),
    ],
)  # fmt: skip
def test_a_language_has_its_tokenizer(language, name):
    assert tokenizer_for(language) == name


@pytest.mark.parametrize(("language", "name"), [("ja", "ja-mecab"), ("ko", "ko-mecab")])
def test_japanese_and_korean_take_mecab(language, name, monkeypatch):
    monkeypatch.setattr(sys.modules[tokenizer_for.__module__], "_fault", lambda name: None)
    assert tokenizer_for(language) == name


@pytest.mark.parametrize("language", ["ja", "ko"])
def test_without_mecab_characters_are_taken_and_the_extra_is_named(language, without_mecab, caplog):
    assert tokenizer_for(language) == "char"
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert f"{language}-mecab" in caplog.text and f"pip install 'sacrebleu[{language}]'" in caplog.text
    with pytest.raises(
        InputError, match=rf"tokenize='{language}-mecab' cannot be used: [^\n]*sacrebleu\[{language}\]$"
    ):
        check_tokenizer(f"{language}-mecab")


@pytest.mark.parametrize(
    ("file", "language"),
    [("test.zh", "zh"), ("a/test.zh-CN.gz", "zh-CN"), ("test.ja.xz", "ja"), ("test.de", None), ("zh", None)],
)
def test_a_files_name_may_tell_the_language(file, language):
    assert language_of_file(file) == language


def test_a_means_signature_names_all_tokenizers():
    signatures = {"en-de": "nrefs:1|tok:13a|v:2", "en-zh": "nrefs:1|tok:zh|v:2", "zh-en": "nrefs:1|tok:13a|v:2"}
    assert merge_signatures(signatures) == "nrefs:1|tok:13a (en-de zh-en), zh (en-zh)|v:2"
    assert merge_signatures({"en-de": "nrefs:1|tok:13a"}) == "nrefs:1|tok:13a"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for language, lines in {"en": SOURCES, "zh": REFERENCES_ZH, "de": GERMAN}.items():
        (folder / f"text.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_translation_tokenizer([*SOURCES, *GERMAN], vocab_size=300, languages=["de", "zh"])


def load_pairs(texts, languages):
    sources = [
        PairSource(
            source_files=f"{texts}/text.en",
            target_files=f"{texts}/text.{to}",
            source_language="en",
            target_language=to,
        )
        for to in languages
    ]
    return load_sentence_pairs(sources)


def test_directions_have_their_own_tokenizers_and_the_mean_claims_none(texts, tokenizer):
    pairs = evaluation_pairs(load_pairs(texts, ["de", "zh"]), tokenizer)
    scores = score_translations([*GERMAN, *TRANSLATIONS_ZH], pairs)
    assert scores["bleu_en-de"] == pytest.approx(100)
    assert scores["bleu_en-zh"] == pytest.approx(
        sacrebleu.corpus_bleu(TRANSLATIONS_ZH, [REFERENCES_ZH], tokenize="zh").score
    )
    assert scores["bleu"] == pytest.approx((scores["bleu_en-de"] + scores["bleu_en-zh"]) / 2)
    assert "|tok:13a (en-de), zh (en-zh)|" in scores["bleu_signature"]
    assert "(" not in scores["chrf_signature"]


def test_a_tokenizer_that_is_told_is_that_of_all_directions(texts, tokenizer):
    pairs = evaluation_pairs(load_pairs(texts, ["de", "zh"]), tokenizer, tokenize="char")
    assert "|tok:char|" in score_translations([*GERMAN, *TRANSLATIONS_ZH], pairs)["bleu_signature"]


def train(folder, *overrides):
    return train_translation(*parse_arguments([str(folder / "config.yaml"), "--max_steps", "1", *overrides], CLASSES))


@pytest.fixture(scope="module")
def trained(texts):
    """A training that names its languages; "unnamed" has only the files' names."""
    paths = {
        f"{part}_{side}_files": [f"{texts}/text.{language}"]
        for part in ("train", "validation")
        for side, language in (("source", "en"), ("target", "zh"))
    }
    paths |= {"cache_dir": f"{texts}/cache", "output_dir": f"{texts}/run"}
    (texts / "config.yaml").write_text(
        TRANSLATION_CONFIG + json.dumps(paths)[1:-1].replace(', "', '\n"'), encoding="utf-8"
    )
    return train(texts, "--source_language", "en", "--target_language", "zh")[1]


def test_a_training_takes_the_target_languages_tokenizer(texts, trained):
    assert "|tok:zh|" in trained["eval_bleu_signature"]
    _, unnamed = train(texts, "--output_dir", f"{texts}/unnamed")
    assert "|tok:zh|" in unnamed["eval_bleu_signature"]
    _, told = train(texts, "--output_dir", f"{texts}/told", "--target_language", "zh", "--tokenize", "char")
    assert "|tok:char|" in told["eval_bleu_signature"]
    assert "tokenize: char" in (texts / "told" / "run.yaml").read_text()


def test_a_multilingual_training_reports_all_tokenizers(tmp_path):
    write_translation_config(tmp_path, {"en": SOURCES, "zh": REFERENCES_ZH})
    _, metrics = train(tmp_path)
    assert "|tok:zh (en-zh), 13a (zh-en)|" in metrics["eval_bleu_signature"]


def test_the_evaluation_takes_the_tokenizer_of_the_training_or_the_file_or_as_told(texts, trained, capsys):
    copy = texts / "references.txt"
    copy.write_text("\n".join(REFERENCES_ZH) + "\n", encoding="utf-8")
    arguments = [str(texts / "run"), str(texts / "text.en"), str(copy), "--num_beams", "1"]
    for told, shown in ([], "zh"), (["--tokenize", "char"], "char"):
        assert command.main([*arguments, *told]) == 0
        assert re.search(rf"eval_bleu_signature = \S*\|tok:{shown}\|", capsys.readouterr().out)
    (texts / "run" / "run.yaml").unlink()  # as of a model from elsewhere
    for file, shown in (texts / "text.zh", "zh"), (copy, "13a"):
        metrics, _ = evaluate_translation(str(texts / "run"), str(texts / "text.en"), str(file), num_beams=1)
        assert f"|tok:{shown}|" in metrics["eval_bleu_signature"]


def test_an_unknown_tokenizer_is_refused_before_anything_is_read(tmp_path, capsys):
    assert command.main(["nowhere", "a", "b", "--tokenize", "moses"]) == 1
    assert re.match(r"error: tokenize='moses' is not known, use one of .*\n\Z", capsys.readouterr().err)
    nowhere = {"train_pairs": None, "train_files": ["nowhere.tsv"]}
    write_translation_config(tmp_path, {"en": SOURCES, "zh": REFERENCES_ZH}, **nowhere)
    with pytest.raises(InputError, match="tokenize='moses' is not known"):
        train(tmp_path, "--tokenize", "moses")
