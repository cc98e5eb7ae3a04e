"""Every Python block in docs/answers.md runs unchanged, in a process that has run no other block."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "answers.md"
QUESTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
BLOCKS = [
    (question.partition("\n")[0], block)
    for question in QUESTIONS
    for block in re.findall(r"^```python\n(.*?)^```$", question, flags=re.M | re.S)
]
OPTIONAL = ("peft", "torchao")  # `make test-ecosystem` installs them
# PEFT 0.21.2 reads the name that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_every_question_has_a_block():
    assert [name for name, _ in BLOCKS] == [question.partition("\n")[0] for question in QUESTIONS]


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_block_runs(block, tmp_path, monkeypatch):
    for package in OPTIONAL:
        if re.search(rf"^from {package}\b", block, flags=re.M):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "__main__"})
