"""The routing report: a page that needs nothing but itself, and pictures of the same numbers."""

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
        output: the page's file; the pictures get its name with .png, and -history.png if there is a history.
        data: what `report_data` returned.
        routing: what `collect_routing` returned.
        history: what `read_expert_history` returned, or {}.

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
    with ExitStack() as stack:  # all of them are whole before the first takes its place
        for name, file in files.items():
            inside = stack.enter_context(whole_file(file, "output"))
            with naming("output", file):
                write[name](inside)
    return {name: str(file) for name, file in files.items()}


def report_files(output: Path) -> dict[str, Path]:
    """The page and its pictures, by what they are."""
    pictures = {"plot": output.with_suffix(".png"), "history_plot": output.with_name(f"{output.stem}-history.png")}
    return {"page": output} | pictures


def render_page(data: dict) -> str:
    """The HTML, with styles, scripts and data inside.

    The data come from a text that may hold anything, "</script>" and "<!--" too. In JSON "<" occurs inside strings
    only, where its escape is the same string.
    """
    parts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir() if path.suffix in (".css", ".js")}
    parts["data.json"] = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # In one pass, so that a part's text is not searched for places of other parts.
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], (PAGE / "page.html").read_text(encoding="utf-8"))
