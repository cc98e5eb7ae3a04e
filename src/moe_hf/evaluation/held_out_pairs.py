"""Held-out sentence pairs: their batches, and the scores of their translations."""

from dataclasses import dataclass, field

from datasets import Dataset

from ..data.token_batches import TokenBatchSampler
from ..data.tokenized_pairs import tokenize_pairs
from ..errors import InputError
from .bleu_tokenizers import DEFAULT_TOKENIZER, language_of_file, merge_signatures, tokenizer_for
from .metrics import load_metric

# Default tokens of a batch for perplexity.
TOKENS_PER_BATCH = 8000


@dataclass(frozen=True)
class EvaluationPairs:
    """Held-out pairs.

    Attributes:
        tokens: the result of `tokenize_pairs`.
        references: the targets as text.
        directions: the name of each direction.
        bleu_tokenizers: {direction: name of sacrebleu's tokenizer}; "13a" for other directions.
    """

    tokens: Dataset
    references: list[str]
    directions: list[str]
    bleu_tokenizers: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.references)


def evaluation_pairs(
    pairs,
    tokenizer,
    num_proc: int | None = None,
    *,
    tokenize: str | None = None,
    target_files: list[str] | str | None = None,
) -> EvaluationPairs:
    """Tokenize held-out pairs, without leaving out or truncating long pairs.

    Args:
        pairs (SentencePairs): the result of `load_sentence_pairs`.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.
        num_proc: number of processes; None: one.
        tokenize: sacrebleu's tokenizer for BLEU; by default the tokenizer of each direction's target language.
        target_files: files whose names end in the target language (text.zh), if the pairs do not name it.
    """
    first = target_files if isinstance(target_files, str) else next(iter(target_files or []), "")
    languages = [target or language_of_file(first) for _, target in pairs.directions]
    tokenizers = {language: tokenize or tokenizer_for(language) for language in dict.fromkeys(languages)}
    directions = [f"{source or '?'}-{target or '?'}" for source, target in pairs.directions]
    return EvaluationPairs(
        tokenize_pairs(pairs, tokenizer, num_proc=num_proc),
        pairs.dataset["target"][:],
        directions,
        {name: tokenizers[language] for name, language in zip(directions, languages)},
    )


def evaluation_batches(
    pairs: EvaluationPairs, tokens_per_batch: int = TOKENS_PER_BATCH, num_processes: int = 1
) -> TokenBatchSampler:
    """Return the batches for perplexity.

    Args:
        pairs: the held-out pairs.
        tokens_per_batch: maximal tokens of a batch, counting the longer side of each pair and padding.
        num_processes: number of processes that share the batches.

    Raises:
        InputError: the processes cannot share the pairs evenly.
    """
    try:
        return TokenBatchSampler(
            pairs.tokens["source_length"],
            pairs.tokens["target_length"],
            tokens_per_batch,
            num_processes=num_processes,
            limit_name="eval_tokens_per_batch",
        )
    except InputError as error:
        raise InputError(f"validation pairs: {error}") from error


def score_translations(translations: list[str], pairs: EvaluationPairs) -> dict[str, float | str]:
    """Return BLEU, lower-case BLEU and chrF with their signatures, also for each direction if there are several.

    The signature of a mean of directions with different tokenizers names each tokenizer with its directions.
    """
    metric = load_metric("sacrebleu_metrics")
    directions = pairs.tokens["direction"]
    scores, found = {}, {}
    for number, name in enumerate(pairs.directions):
        rows = [row for row, direction in enumerate(directions) if direction == number]
        values = metric.compute(
            predictions=[translations[row] for row in rows],
            references=[pairs.references[row] for row in rows],
            tokenize=pairs.bleu_tokenizers.get(name, DEFAULT_TOKENIZER),
        )
        for key, value in values.items():
            found.setdefault(key, {})[name] = value
            if len(pairs.directions) > 1 and not isinstance(value, str):
                scores[f"{key}_{name}"] = value
    means = {
        key: merge_signatures(values) if key.endswith("_signature") else sum(values.values()) / len(values)
        for key, values in found.items()
    }
    return means | scores
