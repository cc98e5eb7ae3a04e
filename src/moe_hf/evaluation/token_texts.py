"""How single tokens read inside a text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token with the space before it, if it brings one; put together they are the text.

    A decoder drops the space before the first token, so each token is decoded behind itself, and the first part taken
    away, whatever the kind of tokenizer. A token that is a part of a character becomes U+FFFD.
    """
    texts = []
    for token in ids:
        alone, twice = (
            tokenizer.decode([token] * times, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for times in (1, 2)
        )
        texts.append(twice[len(alone) :] if twice.startswith(alone) else tokenizer.convert_ids_to_tokens(token))
    return texts
