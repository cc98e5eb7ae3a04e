"""Every public name has a docstring and a place in the API reference."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import moe_hf

PAGES = Path(__file__).parents[2] / "docs" / "api"
PUBLIC = [name for name in moe_hf.__all__ if not name.startswith("__")]


def resolve(path: str):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


DOCUMENTED = {
    path: resolve(path)
    for page in sorted(PAGES.glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_and_a_place(name):
    member = getattr(moe_hf, name)
    assert member.__doc__ and "\n" not in member.__doc__.strip().splitlines()[0]
    assert any(documented is member for documented in DOCUMENTED.values()), f"{name} is missing in docs/api/"


@pytest.mark.parametrize("path", DOCUMENTED)
def test_what_is_on_a_page_has_a_docstring(path):
    member = DOCUMENTED[path]
    assert member.__dict__.get("__doc__") if isinstance(member, type) else member.__doc__


def test_the_first_page_lists_the_public_names():
    rows = re.findall(
        r"^\| \[`([\w.]+)`\]\[([\w.]+)\]", (PAGES / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows] == PUBLIC
    assert all(DOCUMENTED[path] is getattr(moe_hf, name) for name, path in rows)
