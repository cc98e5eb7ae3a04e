"""The trained models in model_cards/ load in both ways, and have the scores that their cards state."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from moe_hf.demo.shipped import SENTENCES, run_shipped_demo
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.evaluation.translation_model import evaluate_translation
from moe_hf.model_code import add_code
from moe_hf.translator import Translator

ROOT = Path(__file__).parents[1]
NAME, LM_NAME = "model_cards/tatoeba-en-de-fr", "model_cards/wikipedia-moe-48"
CAPTIONS_NAME = "model_cards/multi30k-en-de"
FOLDER, LM_FOLDER, CAPTIONS_FOLDER = ROOT / NAME, ROOT / LM_NAME, ROOT / CAPTIONS_NAME
DIRECTIONS = [("en", "de"), ("de", "en"), ("en", "fr"), ("fr", "en")]
LARGEST = {NAME: 8_000_000, LM_NAME: 8_000_000, CAPTIONS_NAME: 24_000_000}  # bytes: they are part of every clone
NAMES = pytest.mark.parametrize("name", LARGEST)
WITHOUT_PACKAGE = """
import sys
sys.modules["moe_hf"] = None
{example}
"""


@pytest.fixture(scope="module")
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def card():
    return ModelCard.load(FOLDER / "README.md")


def translate(model, tokenizer, language, lines):
    return [found[0].text for found in Translator(model, tokenizer, language, num_beams=4).translate(lines)]


def sample_files(source, target):
    pair = "-".join(sorted((source, target), key="en".__ne__))
    return f"tests/tatoeba_sample/{pair}.{source}", f"tests/tatoeba_sample/{pair}.{target}"


@NAMES
def test_a_repository_is_small_and_complete(name):
    names = {path.name for path in (ROOT / name).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {"modeling_lstm_moe.py" if name == LM_NAME else "modeling_gnmt_moe.py", "expert_history.png"} <= names
    assert sum(path.stat().st_size for path in (ROOT / name).iterdir() if path.is_file()) <= LARGEST[name]


@NAMES
def test_the_code_is_the_packages(name, tmp_path):
    """After a change in models/, `moe_hf.model_code.add_code(FOLDER)` copies it into the folder."""
    shutil.copyfile(ROOT / name / "config.json", tmp_path / "config.json")
    add_code(tmp_path)
    assert {path.name: path.read_text() for path in (ROOT / name).glob("*.py")} == {
        path.name: path.read_text() for path in tmp_path.glob("*.py")
    }


@NAMES
def test_weights_take_two_bytes_and_load_as_float32(name):
    auto_class = AutoModelForCausalLM if name == LM_NAME else AutoModelForSeq2SeqLM
    model = auto_class.from_pretrained(ROOT / name)
    assert model.dtype == torch.float32
    assert (ROOT / name / "model.safetensors").stat().st_size < 2.1 * model.num_parameters()
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.state_dict().values())


@pytest.mark.parametrize(("name", "part_of_output"), [(NAME, "Satz"), (LM_NAME, "The "), (CAPTIONS_NAME, "Ein")])
def test_the_cards_example_runs_without_the_package(name, part_of_output, tmp_path):
    example = ModelCard.load(ROOT / name / "README.md").text.split("```python\n")[1].split("```")[0]
    assert f'"{name}", trust_remote_code=True' in example
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE.format(example=example)],
        cwd=ROOT,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert part_of_output in result.stdout


def test_the_command_translates(monkeypatch, call_command, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "lines").write_text("She is reading a book.\n\nThank you.\n", encoding="utf-8")
    status, output, _ = call_command("translate", NAME, tmp_path / "lines", "--target_language", "fr")
    first, *others = output.split("\n")
    assert status == 0 and first.startswith("Elle ") and "livre" in first and others == ["", "Merci.", ""]


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_the_card_states_the_scores_of_the_sample(source, target, card, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sample_files(source, target)
    assert f"moe-hf evaluate-translation {NAME} {files[0]} {files[1]} --target_language {target}\n" in card.text
    metrics, translations = evaluate_translation(NAME, *files, target_language=target, num_beams=4)
    assert_scores_are_stated(card, files, metrics)
    assert len(translations) == 16


def test_the_card_of_the_captions_states_the_scores_of_the_sample(monkeypatch):
    monkeypatch.chdir(ROOT)
    card = ModelCard.load(CAPTIONS_FOLDER / "README.md")
    files = "tests/caption_sample/en-de.en", "tests/caption_sample/en-de.de"
    search = "--num_beams 8 --length_alpha 0.6 --coverage_beta 0.2"
    assert f"moe-hf evaluate-translation {CAPTIONS_NAME} {files[0]} {files[1]} {search}\n" in card.text
    metrics, translations = evaluate_translation(
        CAPTIONS_NAME, *files, num_beams=8, length_alpha=0.6, coverage_beta=0.2
    )
    assert_scores_are_stated(card, files, metrics)
    assert translations[1] == "Zwei Kinder spielen am Strand im Sand."


def assert_scores_are_stated(card, files, metrics):
    [names] = re.findall(r"^\| files (\|.*\|)$", card.text, re.M)
    [values] = re.findall(rf"^\| {Path(files[0]).name} → {Path(files[1]).name} (\|.*\|)$", card.text, re.M)
    row = dict(zip(names.strip("| ").split(" | "), map(float, values.strip("| ").split(" | "))))
    stated = {name: row[name] for name in ("BLEU", "chrF")}
    measured = {"BLEU": metrics["eval_bleu"], "chrF": metrics["eval_chrf"]}
    assert measured == pytest.approx(stated, abs=0.5)  # another processor may round a tie the other way


def test_the_demo_begins_with_its_translations(caplog):
    caplog.set_level("INFO", logger="moe_hf")
    translations = run_shipped_demo(str(FOLDER))
    assert translations.keys() == SENTENCES.keys()
    assert all(f"-> {text}" in caplog.text for texts in translations.values() for text in texts)
    assert translations["en", "de"] == ["Wo ist der Bahnhof?", "Ich habe gestern den letzten Zug verpasst."]
    assert translations["en", "fr"][0] == "Où est la gare la plus proche ?"


def test_the_example_translates_there_and_back(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["round_trip.py", "--through", "fr", "I lost my key."])
    runpy.run_path(str(ROOT / "examples" / "round_trip.py"), run_name="__main__")
    there, through, back = capsys.readouterr().out.split(" -> ")
    assert there == "I lost my key." and "perdu" in through and back.startswith("I")


ODD_LINES = {
    "empty": "",
    "only spaces": "   ",
    "numbers": "12 1234567890 3.14 -7 10:45 1,000,000",
    "emoji": "I love you \U0001f600\U0001f389",
    "another script": "これは日本語の文です。",
    "another language": "Questa è una frase italiana.",
    "capitals": "WHERE IS THE STATION?",
    "tags": "<2de> <b>hello</b> </s> <pad>",
    "one letter": "a",
    "punctuation": "?!?!... -- \"'",
    "one word, 100 letters": "x" * 100,
    "many words": "The dog sees the cat and the cat sees the dog. " * 6,
}


def test_odd_lines_get_an_answer_of_bounded_length(model, tokenizer):
    outputs = dict(zip(ODD_LINES, translate(model, tokenizer, "de", ODD_LINES.values())))
    assert outputs["empty"] == outputs["only spaces"] == ""
    for name, line in ODD_LINES.items():
        assert len(tokenizer(outputs[name]).input_ids) <= 3 * len(tokenizer(line).input_ids) + 14, name


def test_the_card_of_the_language_model_states_the_perplexity_of_the_sample(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, sample = (LM_FOLDER / "README.md").read_text(), "tests/english_sample.txt"
    assert f"moe-hf evaluate-lm {LM_NAME} {sample}\n" in text
    [names] = re.findall(r"^\| files (\|.*\|)$", text, re.M)
    [values] = re.findall(rf"^\| {Path(sample).name} (\|.*\|)$", text, re.M)
    row = dict(
        zip(names.strip("| ").split(" | "), (float(x.replace(",", "")) for x in values.strip("| ").split(" | ")))
    )
    metrics = evaluate_lm(LM_NAME, [sample])
    assert metrics["eval_perplexity_per_word"] == pytest.approx(row["perplexity per word"], rel=1e-3)


def test_the_language_model_prefers_english_in_order():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(LM_FOLDER), AutoTokenizer.from_pretrained(LM_FOLDER)
    sentences = (ROOT / "tests" / "english_sample.txt").read_text().splitlines()
    for sentence in sentences:
        shuffled = " ".join(reversed(sentence.split()))
        losses = []
        for text in (sentence, shuffled):
            ids = tokenizer(text, return_tensors="pt").input_ids
            losses.append(model(ids, labels=ids).loss.item())
        assert losses[0] < losses[1] - 0.5, sentence


def test_attribution_is_on_the_cards(card):
    assert card.data.license == "cc-by-2.0" and card.data.language == ["en", "de", "fr"]
    assert "tatoeba.org" in card.text and "manythings.org/anki" in card.text
    lm_card = ModelCard.load(LM_FOLDER / "README.md")
    assert lm_card.data.license == "cc-by-sa-3.0" and lm_card.data.language == ["en"]
    assert "en.wikipedia.org" in lm_card.text
    captions_card = ModelCard.load(CAPTIONS_FOLDER / "README.md")
    assert captions_card.data.license == "other" and "non-commercial research" in captions_card.text
