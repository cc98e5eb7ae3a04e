"""Pages of the site that lie outside of docs/: the tables of the benchmarks and the model cards.

In the repository, a page of docs/ links to them by `../benchmarks/results/NAME.md` and `../model_cards/...`. The site
has them at the same place below its root, and this hook shortens the links accordingly.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

OUTSIDE = ("benchmarks/results", "model_cards")
LINK = re.compile(r"\]\((\.\./[^)#\s]*)")


def on_files(files, config):
    """Add the files of `OUTSIDE`, under their path in the repository."""
    root = Path(config.config_file_path).parent
    for folder in OUTSIDE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".md", ".png"):
                files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Take the step out of docs/ from links to the files of `OUTSIDE`."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def shorten(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not target.startswith(OUTSIDE):
            return match[0]
        return "](" + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(shorten, markdown)
