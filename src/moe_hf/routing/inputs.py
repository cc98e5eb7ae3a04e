"""Loads a model of either family, and opens the text for a routing report."""

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.cache_folder import cached_in
from ..data.pair_sources import PairSource
from ..data.sentence_pairs import load_sentence_pairs
from ..data.text import load_text_dataset, tokenize_to_stream
from ..data.tokenized_pairs import tokenize_pairs
from ..data.translation_tokenizers import language_tag_id
from ..errors import InputError
from ..loading import load_model_and_tokenizer
from .texts import PairText, StreamText


def load_for_routing(
    model: str, target_language: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, onto a GPU if there is one, and its tokenizer.

    Args:
        model: folder or Hub name.
        target_language: language to translate into, for a multilingual model.

    Raises:
        InputError: the model or its tokenizer cannot be loaded, or they do not know the language.
    """
    loaded, tokenizer = load_model_and_tokenizer(model)
    if target_language is not None:
        if not loaded.config.is_encoder_decoder:
            raise InputError(f"target_language={target_language!r} is for translation models, which {model} is not")
        language_tag_id(tokenizer, target_language)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def open_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: list[str],
    *,
    target_language: str | None = None,
    batch_size: int = 16,
    window_length: int = 64,
    carry_state: bool = True,
    max_tokens: int = 200_000,
) -> StreamText | PairText:
    """Open text files for a model of either family, in the form that `collect_routing` takes.

    Args:
        model: a model of either family.
        tokenizer: its tokenizer.
        files: as for `routing_report`.
        target_language: as for `routing_report`.
        batch_size: as for `routing_report`.
        window_length: as for `routing_report`.
        carry_state: as for `routing_report`.
        max_tokens: as for `routing_report`.

    Raises:
        InputError: a file cannot be read, or a translation model is not given exactly two files.
    """
    if not model.config.is_encoder_decoder:
        with cached_in(None):
            stream = tokenize_to_stream(load_text_dataset(files, max_lines=max_tokens), tokenizer)
        return StreamText(stream, window_length, batch_size, max_tokens, carry_state)
    if len(files) != 2:
        raise InputError(f"files={files}: a translation model needs two, the sources and their translations")
    source = PairSource(source_files=[files[0]], target_files=[files[1]], target_language=target_language)
    with cached_in(None):
        pairs = tokenize_pairs(load_sentence_pairs([source], max_pairs=max_tokens), tokenizer)
    return PairText(pairs, model.config.decoder_start_token_id, batch_size, max_tokens)


def num_positions(text: StreamText | PairText) -> dict[str, int]:
    """Return {side: P}, the number of positions of each side."""
    return {name: len(side.ids) for name, side in text.sides.items()}


def batches_with_progress(text: StreamText | PairText, model: PreTrainedModel) -> Iterator[tuple[dict, dict]]:
    """Yield the batches on the model's device, with a progress bar on a terminal."""
    with tqdm(total=sum(num_positions(text).values()), unit=" tokens", desc="Routing", disable=None) as bar:
        for inputs, positions in text.batches(model.config):
            tensors = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
            yield inputs | tensors, positions
            bar.update(sum(int((places >= 0).sum()) for places in positions.values()))
