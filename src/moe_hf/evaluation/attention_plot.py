"""A heat map of the attention of one translation."""

from pathlib import Path

from ..errors import InputError
from ..extra_packages import require_packages
from ..translator import Translation, Translator
from ..writing import check_file, whole_file


def check_plot_file(file: str | Path) -> None:
    """Check that a plot can be written. Call it before work that could be lost.

    Args:
        file: the plot's file; its ending decides the format.

    Raises:
        InputError: the format does not exist, the file cannot be written, or matplotlib is missing.
    """
    require_packages("matplotlib")
    from matplotlib.figure import Figure

    kind = Path(file).suffix.removeprefix(".").lower()
    kinds = Figure().canvas.get_supported_filetypes()
    if kind not in kinds:
        raise InputError(f"attention_plot={file} must end in one of {', '.join(f'.{kind}' for kind in kinds)}")
    check_file(file, "attention_plot")


def plot_attention(translator: Translator, translation: Translation, file: str | Path) -> None:
    """Save which source tokens the decoder looks at while it writes each target token.

    Args:
        translator: the translator that made the translation.
        translation: a result of `translator`, with at least one target token.
        file: a PNG file, or another format of matplotlib.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    def names(ids):
        texts = [translator.tokenizer.decode([token]).strip() for token in ids]
        return [text if text.isprintable() else "·" for text in texts]  # a token may be a part of a character

    weights = translator.attention(translation).float().cpu().numpy()
    height, width = weights.shape
    figure = Figure(figsize=(2 + 0.4 * width, 2 + 0.3 * height), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(width), names(translation.source_ids), rotation=60, ha="right")
    axes.set_yticks(range(height), names(translation.target_ids))
    axes.set_xlabel("source")
    axes.set_ylabel("translation")
    figure.colorbar(picture, label="attention")
    with whole_file(file, "attention_plot") as whole:
        figure.savefig(whole, dpi=120)
