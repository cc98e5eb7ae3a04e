"""Returns the text of single tokens, as it appears inside a longer text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

FRAGMENT = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, including a leading space; joined, they are the whole text.

    A token that is a part of a character gives U+FFFD; `whole_characters` decodes such tokens together.
    """
    return [_text(tokenizer, [token]) for token in ids]


def whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the texts of consecutive tokens that are parts of characters.

    The first token of a character has the character's text, and its other tokens have an empty text. Tokens that do
    not form a whole character keep U+FFFD.
    """
    texts, start = token_texts(tokenizer, ids), 0
    for end in range(1, len(ids) + 1):
        together = _text(tokenizer, ids[start:end])
        if FRAGMENT not in together:
            texts[start:end] = [together] + [""] * (end - start - 1)
            start = end
    return texts


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Decoding drops the space before the first token. So the tokens are decoded once, and twice in a row: the longer
    # result adds the text of the second copy, with its space. This works for any kind of tokenizer.
    alone, twice = (
        tokenizer.decode(list(ids) * times, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for times in (1, 2)
    )
    return twice[len(alone) :] if twice.startswith(alone) else "".join(tokenizer.convert_ids_to_tokens(list(ids)))
