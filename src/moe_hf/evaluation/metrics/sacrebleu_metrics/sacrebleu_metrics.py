"""BLEU and chrF of translations by sacrebleu, as an `evaluate.Metric` that loads without the network."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

from moe_hf.errors import InputError
from moe_hf.evaluation.bleu_tokenizers import DEFAULT_TOKENIZER, check_tokenizer

_DESCRIPTION = """
Corpus BLEU (Post, 2018) and chrF of detokenised translations against one reference each.

bleu_lowercase stands for the "lowercased, tokenised" BLEU of the papers on Multi30k, which is multi-bleu.perl on text
lowercased and tokenised by Moses. For German and Czech the two agree within 0.05; for French, whose elisions (l'eau)
Moses splits and 13a does not, Moses' is up to one BLEU higher (docs/LOG.md), so there the two must not be compared.
"""

_INPUTS = """
Args:
    predictions: translations, detokenised; one may be empty.
    references: as many reference translations, one for each.
    tokenize: sacrebleu's name of the tokenizer of BLEU. The default, 13a (mteval-v13a), parts words by spaces; Chinese
        wants zh, Japanese ja-mecab, Korean ko-mecab, and other languages without spaces char. chrF takes none.

Returns:
    bleu: case-sensitive BLEU, 0 to 100.
    bleu_lowercase: the same after lowercasing both sides.
    chrf: chrF2, 0 to 100.
    bleu_signature, bleu_lowercase_signature, chrf_signature: sacrebleu's descriptions, to be given with a score.

Raises:
    InputError: no predictions, another number of references, or an unknown tokenizer, or one that cannot be used here.
"""


class SacrebleuMetrics(evaluate.Metric):
    """See the description above."""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Keep predictions and their references until `compute`."""
        _check(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references, tokenize=DEFAULT_TOKENIZER):
        check_tokenizer(tokenize)
        values = {}
        metrics = {
            "bleu": BLEU(tokenize=tokenize),
            "bleu_lowercase": BLEU(lowercase=True, tokenize=tokenize),
            "chrf": CHRF(),
        }
        for name, metric in metrics.items():
            values[name] = metric.corpus_score(predictions, [references]).score
            values[f"{name}_signature"] = str(metric.get_signature())
        return values


def _check(predictions, references) -> None:
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references, they must be equally many")
    if len(predictions) == 0:
        raise InputError("predictions and references are empty, at least one sentence is needed")
