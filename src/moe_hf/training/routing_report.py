"""Read a text with a trained model, and write the report on what its gates did."""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..errors import InputError
from ..evaluation.history_plot import HISTORY_FILE, read_expert_history
from ..evaluation.routing_data import report_data
from ..evaluation.routing_report import write_report
from ..evaluation.routing_statistics import choose_layers, collect_routing
from .pair_sources import PairSource
from .parallel_data import load_sentence_pairs
from .routing_texts import PairText, StreamText
from .runs import load_model_and_tokenizer
from .text_data import load_text_dataset, tokenize_to_stream
from .tokenized_pairs import tokenize_pairs
from .translation_tokenizers import language_tag_id

# Candidates for each context that is shown, as equal ones are shown once.
CANDIDATES = 4


def routing_report(
    model: str,
    files: list[str],
    output: str | Path,
    *,
    target_language: str | None = None,
    layers: list[str] | None = None,
    history: str | Path | None = None,
    batch_size: int = 16,
    window_length: int = 64,
    carry_state: bool = True,
    max_tokens: int = 200_000,
    num_contexts: int = 8,
    context_width: int = 6,
) -> dict[str, str]:
    """Write the page `output` and, beside it, PNGs of the same name.

    Args:
        model: folder or Hub name of a model of either family and its tokenizer.
        files: for a language model text files, see `load_text_dataset`; for a translation model a file of sources
            and one of their translations.
        output: an .html file.
        target_language: of a multilingual translation model.
        layers: MoE layers to report on; None: all.
        history: `AuxLossCallback`'s CSV file of the training; None: the one in the folder `model`, if there is one.
        batch_size: rows of a text, or sentence pairs, at once.
        window_length, carry_state: of a language model, as for `evaluate_lm`.
        max_tokens: tokens read, of a translation model on either side.
        num_contexts: contexts shown of each expert. context_width: tokens shown on each side of a context's middle.

    Returns:
        what was written: {"page": file, "plot": file}, and "history_plot" if there is a history.

    Raises:
        InputError: an argument is out of range, or a file or the model cannot be read.
    """
    output = _checked_output(output)
    for name, value in (
        ("batch_size", batch_size),
        ("window_length", window_length),
        ("max_tokens", max_tokens),
        ("num_contexts", num_contexts),
        ("context_width", context_width),
    ):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    loaded, tokenizer, family = _load(model, target_language)
    choose_layers(loaded, layers)  # a wrong name is refused before the text is read
    curves = _history(model, history)
    if family == "gnmt_moe":
        if len(files) != 2:
            raise InputError(f"files={files}: a translation model needs two, the sources and their translations")
        source = PairSource(source_files=[files[0]], target_files=[files[1]], target_language=target_language)
        pairs = tokenize_pairs(load_sentence_pairs([source], max_pairs=max_tokens), tokenizer)
        text = PairText(pairs, loaded.config.decoder_start_token_id, batch_size, max_tokens)
    else:
        stream = tokenize_to_stream(load_text_dataset(files, max_lines=max_tokens), tokenizer)
        text = StreamText(stream, window_length, batch_size, max_tokens, carry_state)

    routing = collect_routing(
        loaded,
        _with_progress(text, loaded),
        {name: len(side.ids) for name, side in text.sides.items()},
        layers,
        CANDIDATES * num_contexts,
    )
    facts = {"model": str(model), "files": list(files), "family": family}
    data = report_data(facts, loaded.config, routing, text.sides, tokenizer, curves, num_contexts, context_width)
    return write_report(output, data, routing, curves)


def _checked_output(output: str | Path) -> Path:
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"output={output} must end in .html")
    if not output.parent.is_dir():
        raise InputError(f"output={output}: there is no folder {output.parent}")
    return output


def _load(model: str, target_language: str | None):
    """The model, its tokenizer and its family; InputError: they cannot be loaded, or do not know the language."""
    loaded, tokenizer = load_model_and_tokenizer(model)
    family = loaded.config.model_type
    if target_language is not None:
        if family == "lstm_moe":
            raise InputError(f"target_language={target_language!r} is for translation models, {model} is none")
        language_tag_id(tokenizer, target_language)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, family


def _history(model: str, history: str | Path | None) -> dict[str, dict[str, list[float]]]:
    """The curves of the training by layer; none if the model brings no history."""
    if history is None:
        history = Path(model) / HISTORY_FILE
        if not history.is_file():
            return {}
    return read_expert_history(history)


def _with_progress(text, model):
    """The batches on the model's device, with a bar on a terminal."""
    total = sum(len(side.ids) for side in text.sides.values())
    with tqdm(total=total, unit=" tokens", desc="Routing", disable=None) as bar:
        for inputs, positions in text.batches(model.config):
            tensors = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
            yield inputs | tensors, positions
            bar.update(sum(int((places >= 0).sum()) for places in positions.values()))
