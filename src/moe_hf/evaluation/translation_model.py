"""Evaluates a translation model on sentence pairs: perplexity, BLEU and chrF."""

import logging
import time
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq

from ..data.cache_folder import cached_in
from ..data.pair_sources import PairSource
from ..data.sentence_pairs import load_sentence_pairs
from ..data.translation_tokenizers import encode_sources
from ..errors import InputError
from ..families import TRANSLATION_MODELS
from ..loading import load_model_and_tokenizer
from ..model_files import ADVICE, read_run_file
from ..routing.observe import RoutingTotals, routing_totals
from ..run_folder import CONFIG_FILE
from ..translator import NUM_BEAMS, Translator, move_to_device
from .bleu_tokenizers import DEFAULT_TOKENIZER, check_tokenizer, language_of_file, tokenizer_for
from .held_out_pairs import EvaluationPairs, evaluation_batches, evaluation_pairs, score_translations
from .metrics import load_metric
from .summed_loss import perplexities, summed_pairs_loss

logger = logging.getLogger(__name__)


def evaluate_translation(
    model: str,
    source_file: str,
    target_file: str,
    *,
    target_language: str | None = None,
    tokenize: str | None = None,
    num_beams: int = NUM_BEAMS,
    **translate_arguments,
) -> tuple[dict[str, float | str], list[str]]:
    """Evaluate a model on two aligned text files.

    Args:
        model: folder or Hub name of the model and its tokenizer.
        source_file: the sources, one per line; pairs with an empty side are left out and counted.
        target_file: the references; line n translates line n of `source_file`.
        target_language: language to translate into, for a multilingual model.
        tokenize: sacrebleu's tokenizer for BLEU, such as "13a" or "zh"; by default the tokenizer of the target
            language. The target language is `target_language`, or the language in the model's training, or the end of
            the target file's name (text.zh).
        num_beams: beam size; 1 is greedy search, as in evaluations during training.
        **translate_arguments (Any): further arguments of `Translator`.

    Returns:
        the metrics of `TranslationTrainer.evaluate`, and a translation for each line, "" for a pair that is left out.

    Raises:
        InputError: the model, its tokenizer or a file cannot be read, the files do not fit together, the tokenizer
            does not know the language, an argument of the translator is not allowed, a package for the metrics is
            missing, or `tokenize` cannot be used.
    """
    for name in ("sacrebleu_metrics", "stream_perplexity"):
        load_metric(name)  # fails before the translations are computed
    check_tokenizer(tokenize)
    if tokenize is None and target_language is None:
        tokenize = tokenizer_for(_trained_language(model) or language_of_file(target_file))
    loaded, tokenizer = load_model_and_tokenizer(model, TRANSLATION_MODELS)
    loaded = move_to_device(loaded)
    # Refuses wrong arguments before anything is read or computed.
    translator = Translator(
        loaded, tokenizer, num_beams=num_beams, **({"num_return_sequences": 1} | translate_arguments)
    )
    pairs, held_out = _read_pairs(tokenizer, source_file, target_file, target_language, tokenize)
    start = time.time()
    metrics = _perplexities(loaded, tokenizer, held_out)
    sources = held_out.tokens["input_ids"][:]
    with tqdm(total=len(sources), desc="Translating", disable=None, leave=False) as bar:
        found = [results[0].text for results in translator.translate_ids(sources, on_batch=bar.update)]
    metrics |= score_translations(found, held_out) | {"runtime": round(time.time() - start, 3)}
    translations = dict(zip(pairs.dataset["row"][:], found))
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    return metrics, [translations.get(row, "") for row in range(pairs.num_read)]


def measure_translation(
    model, tokenizer, source_file: str, target_file: str, target_language: str | None = None
) -> tuple[dict[str, float], dict[str, RoutingTotals]]:
    """Run a model over sentence pairs once, in evaluation mode, without translating them.

    Args:
        model (PreTrainedModel): a translation model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        source_file: as for `evaluate_translation`.
        target_file: as for `evaluate_translation`.
        target_language: as for `evaluate_translation`.

    Returns:
        perplexities, and the load of each expert (`routing_totals`).

    Raises:
        InputError: a file cannot be read, the files do not fit together, or the tokenizer does not know the language.
    """
    # The tokenizer for BLEU is given only to suppress a log message, because BLEU is not computed here.
    _, held_out = _read_pairs(tokenizer, source_file, target_file, target_language, DEFAULT_TOKENIZER)
    model = move_to_device(model)
    with routing_totals(model) as totals:
        metrics = _perplexities(model, tokenizer, held_out)
    return {f"eval_{name}": value for name, value in metrics.items()}, totals


def _read_pairs(tokenizer, source_file: str, target_file: str, target_language: str | None, tokenize: str | None):
    """Return the pairs of two files, as text and as tokens."""
    encode_sources(tokenizer, [], target_language)  # refuses a wrong language
    source = PairSource(source_files=[source_file], target_files=[target_file], target_language=target_language)
    with cached_in(None):
        pairs = load_sentence_pairs([source])
        logger.info(f"evaluated: {pairs}")
        return pairs, evaluation_pairs(pairs, tokenizer, tokenize=tokenize)


def _trained_language(model: str) -> str | None:
    """Return the target language from a model's training arguments, for a model of one language pair."""
    path = Path(model, CONFIG_FILE)
    language = read_run_file(path).get("target_language")
    if language is not None and not isinstance(language, str):
        raise InputError(f"{path}: target_language={language!r} is not a text: {ADVICE}")
    return language


def _perplexities(model, tokenizer, pairs: EvaluationPairs) -> dict[str, float]:
    model.eval()
    loader = DataLoader(
        pairs.tokens.select_columns(["input_ids", "labels"]),
        batch_sampler=list(evaluation_batches(pairs)),
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    batches = ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in loader)
    nats, num_tokens = summed_pairs_loss(model, batches).tolist()
    return perplexities(nats, num_tokens, sum(pairs.tokens["target_words"]))
