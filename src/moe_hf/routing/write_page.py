"""Writes the routing report: a self-contained page, and pictures of the same numbers."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

from ..writing import naming, whole_file
from .history_plot import plot_curves
from .plot import plot_routing
from .statistics import LayerRouting

PAGE = Path(__file__).parent / "page"


def write_report(output: Path, data: dict, routing: dict[str, LayerRouting], history: dict) -> dict[str, str]:
    """Write the page and its pictures.

    Args:
        output: the page's file. The pictures have the same name with .png and, if there is a history, -history.png.
        data: the result of `report_data`.
        routing: the result of `collect_routing`.
        history: the result of `read_expert_history`, or {}.

    Returns:
        {"page": file, "plot": file}, and "history_plot" if there is a history.

    Raises:
        InputError: a file cannot be written.
    """
    write = {
        "page": lambda file: file.write_text(render_page(data), encoding="utf-8"),
        "plot": lambda file: plot_routing(routing, file),
    }
    if history:
        write["history_plot"] = lambda file: plot_curves(history, file)
    files = {name: file for name, file in report_files(output).items() if name in write}
    with ExitStack() as stack:  # all files are complete before the first one is moved into place
        for name, file in files.items():
            inside = stack.enter_context(whole_file(file, "output"))
            with naming("output", file):
                write[name](inside)
    return {name: str(file) for name, file in files.items()}


def report_files(output: Path) -> dict[str, Path]:
    """Return {kind of file: path} for the page and its pictures."""
    pictures = {"plot": output.with_suffix(".png"), "history_plot": output.with_name(f"{output.stem}-history.png")}
    return {"page": output} | pictures


def render_page(data: dict) -> str:
    """Return the HTML, with styles, scripts and data inside.

    The data contain words of a text, which may include "</script>" or "<!--". In JSON, "<" occurs only inside strings,
    where its escape has the same meaning.
    """
    parts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir() if path.suffix in (".css", ".js")}
    parts["data.json"] = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # One pass, so that placeholders inside an inserted part are not replaced.
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], (PAGE / "page.html").read_text(encoding="utf-8"))
