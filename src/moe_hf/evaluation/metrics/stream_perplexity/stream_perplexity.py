"""Perplexity of a token stream, per token and per word, as an `evaluate.Metric` that loads without the network."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Perplexity from sums of negative log-likelihoods. The perplexity per word counts one end-of-sentence symbol a line
as a word (Shazeer et al., 2017, appendix C), so that models with different tokenizers can be compared.
"""

_INPUTS = """
Args:
    nll: sum of the negative log-likelihoods of a part of the text, in nats.
    num_tokens: number of tokens scored in that part.
    num_words: number of words in that part, each line's end-of-sentence symbol included.

Returns:
    perplexity_per_token: exp(sum of nll / sum of num_tokens).
    perplexity_per_word: exp(sum of nll / sum of num_words).
    bits_per_word: sum of nll / sum of num_words / ln 2.
"""


class StreamPerplexity(evaluate.Metric):
    """See the description above."""

    def _info(self):
        features = {
            "nll": datasets.Value("float64"),
            "num_tokens": datasets.Value("int64"),
            "num_words": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, nll, num_tokens, num_words):
        total, tokens, words = math.fsum(nll), sum(num_tokens), sum(num_words)
        if tokens <= 0 or words <= 0:
            raise ValueError(f"num_tokens sums to {tokens} and num_words to {words}, both must be at least 1")
        return {
            "perplexity_per_token": _exp(total / tokens),
            "perplexity_per_word": _exp(total / words),
            "bits_per_word": total / words / math.log(2),
        }


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
