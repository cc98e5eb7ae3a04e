"""Judge a trained translation model on sentence pairs: perplexity, BLEU and chrF."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from ..evaluation.routing import RoutingTotals, routing_totals
from ..translation import Translator
from .arguments import TranslationTrainingArguments
from .pair_sources import PairSource
from .parallel_data import load_sentence_pairs
from .runs import load_pretrained
from .translation import evaluation_pairs
from .translation_tokenizers import encode_sources, load_translation_tokenizer
from .translation_trainer import TranslationTrainer


def evaluate_translation(
    model: str,
    source_file: str,
    target_file: str,
    *,
    target_language: str | None = None,
    **translate_arguments,
) -> tuple[dict[str, float | str], list[str]]:
    """Evaluate a model on two aligned text files.

    Args:
        model: folder or Hub name of the model and its tokenizer.
        source_file, target_file: line n of both corresponds; pairs with an empty side are left out and counted.
        target_language: of a multilingual model.
        translate_arguments: of `Translator`, such as num_beams, 1 unless the model says otherwise.

    Returns:
        the metrics of `TranslationTrainer.evaluate`, and a translation for each line, "" for a pair left out.

    Raises:
        InputError: the model, its tokenizer or a file cannot be read, the files do not fit together, the language is
            not the tokenizer's, or an argument of the translator is not allowed.
    """
    tokenizer = load_translation_tokenizer(model)
    pairs = _load_pairs(tokenizer, source_file, target_file, target_language)
    loaded = load_pretrained(AutoModelForSeq2SeqLM, model)
    with _trainer(loaded, tokenizer, pairs, translate_arguments=translate_arguments) as trainer:
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
    with _trainer(model.eval(), tokenizer, pairs) as trainer, routing_totals(model) as totals:
        metrics = trainer.perplexities(trainer.eval_dataset)
    return {f"eval_{name}": value for name, value in metrics.items()}, totals


def _load_pairs(tokenizer, source_file: str, target_file: str, target_language: str | None):
    encode_sources(tokenizer, [], target_language)  # which refuses a wrong language
    source = PairSource(source_files=[source_file], target_files=[target_file], target_language=target_language)
    pairs = load_sentence_pairs([source])
    print(f"evaluated: {pairs}")
    return pairs


@contextmanager
def _trainer(model, tokenizer, pairs, **arguments) -> Iterator[TranslationTrainer]:
    """A trainer that evaluates on the pairs, with a folder of its own for as long."""
    with tempfile.TemporaryDirectory() as folder:
        yield TranslationTrainer(
            model=model,
            args=TranslationTrainingArguments(output_dir=folder, report_to="none", remove_unused_columns=False),
            eval_dataset=evaluation_pairs(pairs, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            **arguments,
        )
