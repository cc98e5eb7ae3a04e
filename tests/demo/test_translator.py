"""The translation demo from corpus to translations, with a model that has learnt next to nothing."""

import pytest
from tiny_runs import TRANSLATION_CONFIG
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from moe_hf.demo import translator as translation_demo
from moe_hf.demo.pair_corpus import SHOWN_LINES
from moe_hf.demo.translator import run_translation_demo
from moe_hf.errors import InputError

CONFIG = TRANSLATION_CONFIG.replace("vocab_size: 290", "vocab_size: 350").replace("batch: 40", "batch: 100")


class Parrot:
    """A translator that knows the English and the German phrases, and answers everything in German."""

    def __init__(self, model, tokenizer, target_language, **kwargs):
        pass

    def translate(self, lines):
        german = {phrase.en: phrase.de for phrase in SHOWN_LINES}
        for line in lines:
            yield [type("Translation", (), {"text": german.get(line, line)})]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return str(tmp_path / "config.yaml")


def test_demo_trains_saves_and_translates_in_three_directions(config, tmp_path, caplog):
    caplog.set_level("INFO", logger="moe_hf")
    shares = run_translation_demo(config, str(tmp_path / "out"))
    assert shares == {"en-de": 0.0, "de-fr": 0.0, "fr-en": 0.0}
    output = "\n".join(caplog.messages)
    assert all(f"  {getattr(phrase, name)} -> " in output for phrase in SHOWN_LINES for name in ("en", "de", "fr"))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model"))


def test_a_translation_counts_only_when_it_is_exact(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(translation_demo, "Translator", Parrot)
    caplog.set_level("INFO", logger="moe_hf")
    shares = run_translation_demo(config, str(tmp_path / "out"))
    assert shares["de-fr"] == shares["fr-en"] == 0.0
    lines = caplog.messages
    for phrase in SHOWN_LINES:
        assert f"  {phrase.en} -> {phrase.de}  ✓" in lines
        assert f"  {phrase.de} -> {phrase.de}  ✗ {phrase.fr}" in lines


def test_a_folder_in_use_is_refused(config, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="output_dir"):
        run_translation_demo(config, str(tmp_path / "out"))
