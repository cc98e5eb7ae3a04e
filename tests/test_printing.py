"""Only commands read the command line and print; the rest of the package takes arguments and logs."""

import ast
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

import moe_hf
from moe_hf.training.runs import quiet_logs

PACKAGE = Path(moe_hf.__file__).parent
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
LIBRARY = [name for name in FILES if not name.startswith("commands/") and name not in ("cli.py", "__main__.py")]


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_module_neither_prints_nor_reads_the_command_line(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.argv", "sys.stdout"), f"{name}:{node.lineno}"


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_only_the_first_process_shows_messages(rank, shown, monkeypatch):
    logger = logging.getLogger("moe_hf")
    monkeypatch.setattr(logger, "level", logging.INFO)
    try:
        quiet_logs(SimpleNamespace(process_index=rank, get_process_log_level=lambda: logging.WARNING))
        assert logging.getLogger("moe_hf.training.lm").isEnabledFor(logging.INFO) == shown
    finally:
        logger.setLevel(logging.NOTSET)
