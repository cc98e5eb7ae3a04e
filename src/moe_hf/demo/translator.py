"""Runs the translation demo: trains one small GNMT-MoE on generated phrases in three languages."""

import json
import logging
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ..data.arguments import TranslationDataArguments
from ..training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from ..training.translation import train_translation
from ..translator import Translator
from .pair_corpus import SHOWN_LINES, write_translation_corpus

logger = logging.getLogger(__name__)

DIRECTIONS = (("en", "de"), ("de", "fr"), ("fr", "en"))
CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def run_translation_demo(config_file: str, output_dir: str) -> dict[str, float]:
    """Write the corpus, train one model for three directions, and translate with the saved model.

    Args:
        config_file: YAML file with the arguments of the training.
        output_dir: folder for the corpus and the model; must be empty or absent.

    Returns:
        {"en-de": share of held-out phrases that are translated exactly, ...}.
    """
    model_dir = Path(output_dir) / "model"
    files = write_translation_corpus(Path(output_dir) / "data")
    _title("Numbers, dates and times; the values of the validation phrases are in no training phrase")
    for phrase in SHOWN_LINES[:3]:
        logger.info("  " + " | ".join(phrase))

    _title("Training: one model, three directions, with the target language's tag on the source")
    overrides = ["--output_dir", str(model_dir), "--train_pairs", json.dumps(_pairs(files["train"]))]
    train_translation(*parse_arguments([config_file, *overrides], CLASSES))

    _title("Held-out phrases translated exactly, by the model loaded back with AutoModelForSeq2SeqLM")
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    shares = {}
    for source, target in DIRECTIONS:
        sources, targets = (files["valid"][name].read_text(encoding="utf-8").splitlines() for name in (source, target))
        translations = [found[0].text for found in Translator(model, tokenizer, target).translate(sources)]
        correct = sum(one == other for one, other in zip(translations, targets, strict=True))
        shares[f"{source}-{target}"] = correct / len(targets)
        logger.info(f"  {source}-{target}: {correct} of {len(targets)} ({correct / len(targets):.1%})")

    _title("Some of them by beam search")
    for source, target in DIRECTIONS:
        translator = Translator(model, tokenizer, target, num_beams=4)
        lines = [getattr(phrase, source) for phrase in SHOWN_LINES]
        for phrase, line, found in zip(SHOWN_LINES, lines, translator.translate(lines)):
            mark = "✓" if found[0].text == getattr(phrase, target) else f"✗ {getattr(phrase, target)}"
            logger.info(f"  {line} -> {found[0].text}  {mark}")
    return shares


def _pairs(files: dict[str, Path]) -> list[dict]:
    return [
        {
            "source_files": str(files[source]),
            "target_files": str(files[target]),
            "source_language": source,
            "target_language": target,
        }
        for source, target in DIRECTIONS
    ]


def _title(text: str) -> None:
    logger.info(f"\n== {text}")
