"""How single tokens read inside a text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

FRAGMENT = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token with the space before it, if it brings one; put together they are the text.

    A token that is a part of a character has U+FFFD; `whole_characters` reads it with its neighbours.
    """
    return [_text(tokenizer, [token]) for token in ids]


def whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The texts of tokens that follow each other and are parts of characters: a character stands at its first token,
    and the others have none. What does not make a whole character keeps U+FFFD.
    """
    texts, start = token_texts(tokenizer, ids), 0
    for end in range(1, len(ids) + 1):
        together = _text(tokenizer, ids[start:end])
        if FRAGMENT not in together:
            texts[start:end] = [together] + [""] * (end - start - 1)
            start = end
    return texts


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # A decoder drops the space before the first token, so the tokens are decoded behind themselves, and the first part
    # taken away, whatever the kind of tokenizer.
    alone, twice = (
        tokenizer.decode(list(ids) * times, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for times in (1, 2)
    )
    return twice[len(alone) :] if twice.startswith(alone) else "".join(tokenizer.convert_ids_to_tokens(list(ids)))
