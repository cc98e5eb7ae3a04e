"""Chooses sacrebleu's tokenizer for BLEU: splitting at spaces would give 0 in a language without spaces."""

import logging
import re
from pathlib import Path

from ..errors import InputError

logger = logging.getLogger(__name__)
DEFAULT_TOKENIZER = "13a"
WITHOUT_EXTRA = "char"  # splits every character, and needs no dictionary
# By ISO 639-1 and 639-3 codes. The languages of "char" write no spaces either, and sacrebleu finds no words in them.
TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    **dict.fromkeys(("bo", "bod", "dz", "dzo", "km", "khm", "lo", "lao", "my", "mya", "th", "tha"), WITHOUT_EXTRA),
}
EXTRAS = {"ja-mecab": "sacrebleu[ja]", "ko-mecab": "sacrebleu[ko]"}


def tokenizer_for(language: str | None) -> str:
    """Return sacrebleu's tokenizer for a target language; "char" and a warning if its extra package is missing.

    Args:
        language: a code such as "zh", "zh-CN" or "zho_Hans"; None (not known) gives "13a".
    """
    code = re.split(r"[-_.@]", language or "")[0].lower()
    name = TOKENIZERS.get(code, DEFAULT_TOKENIZER)
    if name in EXTRAS and _fault(name):
        logger.warning(
            f"BLEU of {language!r} is by characters (tokenize='{WITHOUT_EXTRA}'): the tokenizer {name!r} needs "
            f"pip install '{EXTRAS[name]}'"
        )
        return WITHOUT_EXTRA
    return name


def language_of_file(path: str | Path) -> str | None:
    """Return the code at the end of a file's name, such as "zh" in "test.zh.gz", if `TOKENIZERS` has it."""
    suffixes = [suffix[1:] for suffix in Path(path).suffixes if suffix not in (".gz", ".xz")]
    is_known = bool(suffixes) and re.split("[-_]", suffixes[-1])[0].lower() in TOKENIZERS
    return suffixes[-1] if is_known else None


def check_tokenizer(tokenize: str | None) -> None:
    """Check that sacrebleu has a tokenizer and can use it here.

    Args:
        tokenize: the tokenizer's name, or None.

    Raises:
        InputError: the name is not one of sacrebleu's, or that tokenizer cannot be used here.
    """
    from sacrebleu.metrics import BLEU  # of the extra `eval`

    if tokenize is None:
        return
    if tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"tokenize={tokenize!r} is not known, use one of {', '.join(BLEU.TOKENIZERS)}")
    if fault := _fault(tokenize):
        raise InputError(f"tokenize={tokenize!r} cannot be used: {fault}")


def _fault(name: str) -> str | None:
    """Return why a tokenizer cannot be used, on one line."""
    from sacrebleu.metrics import BLEU

    try:
        BLEU(tokenize=name)
    except (ImportError, OSError, RuntimeError) as error:  # a missing extra, or a vocabulary that it cannot download
        return " ".join(str(error).split())
    return None


def merge_signatures(signatures: dict[str, str]) -> str:
    """Return the signature of the mean of several scores, with all values where the signatures differ.

    Args:
        signatures: {direction: signature}. For example, {"en-de": "nrefs:1|tok:13a", "en-zh": "nrefs:1|tok:zh"} gives
            "nrefs:1|tok:13a (en-de), zh (en-zh)".
    """
    fields = [dict(field.split(":", 1) for field in signature.split("|")) for signature in signatures.values()]
    merged = []
    for name in fields[0]:
        of_value: dict[str, list[str]] = {}
        for direction, values in zip(signatures, fields):
            of_value.setdefault(values[name], []).append(direction)
        texts = [value if len(of_value) == 1 else f"{value} ({' '.join(of)})" for value, of in of_value.items()]
        merged.append(f"{name}:{', '.join(texts)}")
    return "|".join(merged)
