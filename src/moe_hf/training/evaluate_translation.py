"""Judge a trained translation model on sentence pairs: perplexity, BLEU and chrF."""

import tempfile

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

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
    encode_sources(tokenizer, [], target_language)  # which refuses a wrong language
    source = PairSource(source_files=[source_file], target_files=[target_file], target_language=target_language)
    pairs = load_sentence_pairs([source])
    print(f"evaluated: {pairs}")
    loaded = load_pretrained(AutoModelForSeq2SeqLM, model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TranslationTrainer(
            model=loaded,
            args=TranslationTrainingArguments(output_dir=folder, report_to="none", remove_unused_columns=False),
            eval_dataset=evaluation_pairs(pairs, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            translate_arguments=translate_arguments,
        )
        Translator(loaded, tokenizer, **trainer.translate_arguments)  # refuses wrong ones before anything is computed
        metrics = trainer.evaluate()
    translations = dict(zip(pairs.dataset["row"][:], trainer.translations))
    return metrics, [translations.get(row, "") for row in range(pairs.num_read)]
