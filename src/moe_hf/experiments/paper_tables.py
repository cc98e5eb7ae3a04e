"""The paper's language models (tables 7 and 8, appendices C and D) and translation models (appendix E)."""

from typing import NamedTuple


class PaperRow(NamedTuple):
    """One row of tables 7 and 8.

    Attributes:
        name: the paper's name of the model.
        config: name of a file in configs/lm.
        mops: millions of operations per time step, as printed.
        mparams: millions of parameters, as printed.
        dropout: the paper's dropout rate; None if the paper does not name it.
        test_ppl: the paper's test perplexity.
        ops_rounded_down: whether the printed operations are rounded down instead of to the nearest.
        ppl_after_a_tenth: the test perplexity after a tenth of the words, in table 8 only.
    """

    name: str
    config: str
    mops: float
    mparams: float
    dropout: float | None
    test_ppl: float
    ops_rounded_down: bool = False
    ppl_after_a_tenth: float | None = None

    def has_ops(self, ops: int) -> bool:
        """Return whether `ops`, rounded, equals the number in the paper."""
        return (ops // 100_000 / 10 if self.ops_rounded_down else round(ops / 1e6, 1)) == self.mops

    def has_params(self, params: int) -> bool:
        """Return whether `params`, rounded to the nearest, equals the number in the paper."""
        return round(params / 1e6, 1) == self.mparams


BILLION_WORDS_1 = (  # table 7: 1-Billion-Word benchmark
    PaperRow("LSTM-2048-512", "lstm-2048-512.yaml", 9.4, 9.4, 0.1, 44.7),
    PaperRow("4xLSTM-512", "4xlstm-512.yaml", 8.4, 8.4, 0.1, 46.0),
    PaperRow("MoE-1-Wide", "moe-1-wide.yaml", 8.4, 8.4, 0.1, 46.1),
    PaperRow("MoE-1-Deep", "moe-1-deep.yaml", 8.4, 8.4, 0.1, 45.7),
    PaperRow("MoE-4", "moe-4.yaml", 8.4, 8.4, 0.1, 45.0),
    PaperRow("MoE-32", "moe-32.yaml", 8.4, 37.8, 0.1, 39.7),
    # LSTMs and experts have 8,388,608 operations, W_g and W_noise 2 * 512 * 256. The sum is 8,650,752, so the paper's
    # 8.6 is rounded down. A count without W_noise gives 8.520 million here, but only 8.659 million for MoE-4096-h. The
    # paper prints 8.9 there, so its count includes W_noise.
    PaperRow("MoE-256", "moe-256.yaml", 8.6, 272.9, 0.1, 35.7, ops_rounded_down=True),
    PaperRow("MoE-256-h", "moe-256-h.yaml", 8.4, 272.9, 0.1, 36.0),
    PaperRow("MoE-1024-h", "moe-1024-h.yaml", 8.5, 1079.0, 0.2, 34.6),
    PaperRow("MoE-4096-h", "moe-4096-h.yaml", 8.9, 4303.4, 0.2, 34.1),
    PaperRow("MoE-34M", "moe-34m.yaml", 33.8, 4313.9, 0.3, 31.3),
    PaperRow("MoE-143M", "moe-143m.yaml", 142.7, 4371.1, 0.4, 28.0),
)
BILLION_WORDS_100 = (  # table 8: 100 billion words of news; the paper does not name the dropout
    PaperRow("4xLSTM-512", "100b-4xlstm-512.yaml", 8.4, 8.4, None, 47.0, ppl_after_a_tenth=54.5),
    PaperRow("MoE-32", "100b-moe-32.yaml", 8.4, 37.8, None, 40.4, ppl_after_a_tenth=48.5),
    PaperRow("MoE-256-h", "100b-moe-256-h.yaml", 8.4, 272.9, None, 35.3, ppl_after_a_tenth=42.8),
    PaperRow("MoE-1024-h", "100b-moe-1024-h.yaml", 8.5, 1079.0, None, 32.7, ppl_after_a_tenth=40.3),
    PaperRow("MoE-4096-h", "100b-moe-4096-h.yaml", 8.6, 4303.4, None, 30.9, ppl_after_a_tenth=38.9),
    PaperRow("MoE-16384-h", "100b-moe-16384-h.yaml", 8.8, 17201.0, None, 29.7, ppl_after_a_tenth=38.2),
    PaperRow("MoE-65536-h", "100b-moe-65536-h.yaml", 9.2, 68791.0, None, 28.9, ppl_after_a_tenth=38.2),
    PaperRow("MoE-131072-h", "100b-moe-131072-h.yaml", 9.7, 137577.6, None, 29.2, ppl_after_a_tenth=39.8),
)
# Training (appendices C and D): words read, and words of a batch.
WORDS_1, BATCH_WORDS_1 = 10 * 829_000_000, 300_000  # ten epochs
WORDS_100, BATCH_WORDS_100 = 100_000_000_000, 2_500_000  # at most one epoch


class TranslationRow(NamedTuple):
    """One translation model.

    The paper does not define its count of operations exactly, so a row matches within `OPS_TOLERANCE`.

    Attributes:
        name: the model's name.
        config: name of a file in configs/translation.
        mops: millions of operations per time step, as printed.
        gparams: billions of parameters, as printed; None if the paper does not print them.
    """

    name: str
    config: str
    mops: float
    gparams: float | None = None

    def has_ops(self, ops: int) -> bool:
        """Return whether `ops` equals the number in the paper within `OPS_TOLERANCE`."""
        return abs(ops / 1e6 - self.mops) <= OPS_TOLERANCE * self.mops

    def has_params(self, params: int) -> bool:
        """Return whether `params`, with embedding and softmax, rounds to the number in the paper."""
        return self.gparams is None or round(params / 1e9, 1) == self.gparams


OPS_TOLERANCE = 0.03
# This package reads appendix E as follows. Both directions of the encoder's first LSTM are 512 wide, and the second
# LSTM reads them concatenated. Both LSTMs of the decoder read their input and the attention context. LSTMs have 2048
# units and a projection to 512. The operations per time step, in millions:
#     LSTMs                                                      69.2
#     U and W of the attention                                    0.5
#     two MoE layers of four experts with 2048 hidden units      16.8
# The model with n = 0 has one expert as large as four experts in place of each MoE layer, which keeps the operations.
# Without these experts, it would have 69.7 million operations.
TRANSLATION = (
    TranslationRow("MoE-0", "moe-0.yaml", 85),
    TranslationRow("MoE-32", "moe-32.yaml", 85),
    TranslationRow("MoE-512-h", "moe-512-h.yaml", 85),
    TranslationRow("MoE-2048-h", "moe-2048-h.yaml", 85, 8.7),
    TranslationRow("multilingual", "multilingual-moe-512.yaml", 102, 8.7),
)
