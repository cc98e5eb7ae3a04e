"""Runs a model over a text, and writes the report on its routing."""

from pathlib import Path

from ..errors import InputError
from ..extra_packages import require_packages
from ..run_folder import HISTORY_FILE
from ..value_checks import COUNT, MOST_CONTEXTS, Range, check_range
from ..writing import check_file
from .history_plot import read_expert_history
from .inputs import batches_with_progress, load_for_routing, num_positions, open_text
from .page_data import report_data
from .statistics import choose_layers, collect_routing
from .write_page import report_files, write_report

# Candidates for each context shown, because equal contexts are shown only once.
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
    """Write the page `output`, and PNG files with the same name beside it.

    Args:
        model: folder or Hub name of a model of either family and its tokenizer.
        files: text files for a language model, see `load_text_dataset`; a source file and a target file for a
            translation model.
        output: an .html file.
        target_language: language to translate into, for a multilingual model.
        layers: MoE layers to report on; None: all.
        history: the training's CSV file from `AuxLossCallback`; None: the file in the folder `model`, if it exists.
        batch_size: number of rows of a text, or of sentence pairs, at once.
        window_length: for a language model, as for `evaluate_lm`.
        carry_state: for a language model, as for `evaluate_lm`.
        max_tokens: maximal number of tokens read; for a translation model, on each side.
        num_contexts: number of contexts shown for each expert.
        context_width: number of tokens shown on each side of a context's middle.

    Returns:
        the files written: {"page": file, "plot": file}, and "history_plot" if there is a history.

    Raises:
        InputError: an argument is out of range, a file or the model cannot be read, or matplotlib is missing.
    """
    require_packages("matplotlib")
    output = _checked_output(output)
    for name, value in (("batch_size", batch_size), ("window_length", window_length), ("max_tokens", max_tokens)):
        check_range(name, value, COUNT)
    for name, value in (("num_contexts", num_contexts), ("context_width", context_width)):
        check_range(name, value, Range(least=1, most=MOST_CONTEXTS))
    loaded, tokenizer = load_for_routing(model, target_language)
    choose_layers(loaded, layers)  # a wrong name is refused before the text is read
    curves = _history(model, history)
    text = open_text(
        loaded,
        tokenizer,
        files,
        target_language=target_language,
        batch_size=batch_size,
        window_length=window_length,
        carry_state=carry_state,
        max_tokens=max_tokens,
    )
    routing = collect_routing(
        loaded,
        batches_with_progress(text, loaded),
        num_positions(text),
        layers,
        CANDIDATES * num_contexts,
    )
    facts = {"model": str(model), "files": list(files), "family": loaded.config.model_type}
    data = report_data(facts, loaded.config, routing, text.sides, tokenizer, curves, num_contexts, context_width)
    return write_report(output, data, routing, curves)


def _checked_output(output: str | Path) -> Path:
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"output={output} must end in .html")
    for file in report_files(output).values():
        check_file(file, "output")
    return output


def _history(model: str, history: str | Path | None) -> dict[str, dict[str, list[float]]]:
    """Return the curves of the training by layer; {} if the model does not have a history."""
    if history is None:
        history = Path(model) / HISTORY_FILE
        if not history.is_file():
            return {}
    return read_expert_history(history)
