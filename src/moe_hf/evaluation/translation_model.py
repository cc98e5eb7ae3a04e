"""Judge a trained translation model on sentence pairs: perplexity, BLEU and chrF."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from ..data.pair_sources import PairSource
from ..data.sentence_pairs import load_sentence_pairs
from ..data.translation_tokenizers import encode_sources, load_translation_tokenizer
from ..routing.observe import RoutingTotals, routing_totals
from ..training.arguments import TranslationTrainingArguments
from ..training.runs import CONFIG_FILE, load_pretrained
from ..training.translation import evaluation_pairs
from ..training.translation_trainer import TranslationTrainer
from ..translator import Translator
from .bleu_tokenizers import DEFAULT_TOKENIZER, check_tokenizer, language_of_file, tokenizer_for
from .metrics import load_metric


def evaluate_translation(
    model: str,
    source_file: str,
    target_file: str,
    *,
    target_language: str | None = None,
    tokenize: str | None = None,
    **translate_arguments,
) -> tuple[dict[str, float | str], list[str]]:
    """Evaluate a model on two aligned text files.

    Args:
        model: folder or Hub name of the model and its tokenizer.
        source_file, target_file: line n of both corresponds; pairs with an empty side are left out and counted.
        target_language: of a multilingual model.
        tokenize: sacrebleu's tokenizer for BLEU, such as "13a" or "zh"; by default that of the target language, which
            is `target_language`, or that of the model's training, or the end of the target file's name (text.zh).
        translate_arguments: of `Translator`, such as num_beams, 1 unless the model says otherwise.

    Returns:
        the metrics of `TranslationTrainer.evaluate`, and a translation for each line, "" for a pair left out.

    Raises:
        InputError: the model, its tokenizer or a file cannot be read, the files do not fit together, the language is
            not the tokenizer's, or an argument of the translator is not allowed; a package for the metrics is missing,
            or `tokenize` is not known or cannot be used.
    """
    for name in ("sacrebleu_metrics", "stream_perplexity"):
        load_metric(name)  # better now than after the translations
    check_tokenizer(tokenize)
    if tokenize is None and target_language is None:
        tokenize = tokenizer_for(_trained_language(model) or language_of_file(target_file))
    tokenizer = load_translation_tokenizer(model)
    pairs = _load_pairs(tokenizer, source_file, target_file, target_language)
    loaded = load_pretrained(AutoModelForSeq2SeqLM, model)
    with _trainer(loaded, tokenizer, pairs, tokenize, translate_arguments=translate_arguments) as trainer:
        Translator(loaded, tokenizer, **trainer.translate_arguments)  # refuses wrong ones before anything is computed
        metrics = trainer.evaluate()
        translations = dict(zip(pairs.dataset["row"][:], trainer.translations))
    return metrics, [translations.get(row, "") for row in range(pairs.num_read)]


def measure_translation(
    model, tokenizer, source_file: str, target_file: str, target_language: str | None = None
) -> tuple[dict[str, float], dict[str, RoutingTotals]]:
    """One pass of a model over sentence pairs, in evaluation mode, without translating them.

    Args:
        source_file, target_file, target_language: as for `evaluate_translation`.

    Returns:
        perplexities (`TranslationTrainer.perplexities`), and what each expert got from the pairs (`routing_totals`).

    Raises:
        InputError: a file cannot be read, or the files do not fit together, or the language is not the tokenizer's.
    """
    pairs = _load_pairs(tokenizer, source_file, target_file, target_language)
    # No BLEU is taken, so no word about its tokenizer.
    with _trainer(model.eval(), tokenizer, pairs, DEFAULT_TOKENIZER) as trainer, routing_totals(model) as totals:
        metrics = trainer.perplexities(trainer.eval_dataset)
    return {f"eval_{name}": value for name, value in metrics.items()}, totals


def _load_pairs(tokenizer, source_file: str, target_file: str, target_language: str | None):
    encode_sources(tokenizer, [], target_language)  # which refuses a wrong language
    source = PairSource(source_files=[source_file], target_files=[target_file], target_language=target_language)
    pairs = load_sentence_pairs([source])
    print(f"evaluated: {pairs}")
    return pairs


def _trained_language(model: str) -> str | None:
    """The target language that the training of a model for one pair of languages names, if it left its arguments."""
    path = Path(model, CONFIG_FILE)
    return yaml.safe_load(path.read_text(encoding="utf-8")).get("target_language") if path.is_file() else None


@contextmanager
def _trainer(model, tokenizer, pairs, tokenize: str | None = None, **arguments) -> Iterator[TranslationTrainer]:
    """A trainer that evaluates on the pairs, with a folder of its own for as long."""
    with tempfile.TemporaryDirectory() as folder:
        yield TranslationTrainer(
            model=model,
            args=TranslationTrainingArguments(output_dir=folder, report_to="none", remove_unused_columns=False),
            eval_dataset=evaluation_pairs(pairs, tokenizer, tokenize=tokenize),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            **arguments,
        )
