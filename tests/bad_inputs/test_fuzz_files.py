"""Randomly damaged configurations, tokenizers and weights either load or raise an `InputError` of one line."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from bad_inputs import Place
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_hf.data.tokenizers import load_tokenizer, train_tokenizer
from moe_hf.errors import InputError
from moe_hf.loading import load_pretrained
from moe_hf.training.arguments import parse_arguments

# The same examples in every run.
fuzz = settings(derandomize=True, deadline=None, database=None)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def trained(folder):
    """A folder of a language model."""
    return Place(folder).lm()


def check_message(error: InputError) -> None:
    message = str(error)
    assert message.strip() and "\n" not in message and len(message) < 2000, message


def places(tree, path=()):
    """The paths of all values in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    """A copy of the tree with another value at the path."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


CONFIG = {"train_files": ["/nowhere/a.txt"], "output_dir": "/nowhere/run", "use_cpu": True, "report_to": "none"}
NAMES = [*CONFIG, "hidden_size", "num_experts", "gating", "layer_pattern", "learning_rate", "max_steps", "vocab_size"]
NAMES += ["load_loss_coef_schedule", "tokenizer_kind", "optim", "lr_scheduler_type", "logging_steps", "seed", "bf16"]


@settings(fuzz, max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2))
def test_any_values_are_arguments_or_refused(folder, changes):
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes, allow_unicode=True), encoding="utf-8")
    try:
        parse_arguments([str(path)])
    except InputError as error:
        check_message(error)


YAML_PIECES = [
    "a",
    "seed",
    ": ",
    "1",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&x ",
    "*x",
    "!!python/name:os.system",
    "<<: ",
    "'",
    "|\n",
    "? ",
    "\t",
    "#",
    "%",
    "---\n",
    "2026-11-29",
    "1e400",
    "0x",
    "\x07",
]


@settings(fuzz, max_examples=200)
@given(content=st.lists(st.sampled_from(YAML_PIECES) | TEXT, max_size=12).map("".join) | st.binary(max_size=20))
def test_any_yaml_is_read_or_refused(folder, content):
    path = folder / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        parse_arguments([str(path), "--output_dir", "/nowhere/run"])
    except InputError as error:
        check_message(error)


TOKENIZERS = {
    kind: train_tokenizer(["the cat saw the dog"] * 9, kind=kind, vocab_size=size)
    for kind, size in {"word": 5, "bpe": 260}.items()
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(fuzz, max_examples=60)
@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_any_change_of_a_tokenizer_is_loaded_or_refused(folder, kind, data, name):
    target = folder / kind
    TOKENIZERS[kind].save_pretrained(target)
    tree = json.loads((target / name).read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from([place for place in places(tree) if "vocab" not in place[:-1]]))
    (target / name).write_text(json.dumps(replaced(tree, path, data.draw(VALUES))), encoding="utf-8")
    try:
        load_tokenizer(str(target))
    except InputError as error:
        check_message(error)


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_any_change_of_a_header_of_weights_is_loaded_or_refused(folder, trained, data):
    target = folder / "weights"
    shutil.copytree(trained, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = (trained / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    value = data.draw(VALUES | st.sampled_from(["F32", "BF16", "F64", "I64", "X"]) | st.lists(st.integers(-1, 99)))
    tree = replaced(tree, data.draw(st.sampled_from(list(places(tree)))), value)
    header = json.dumps(tree).encode()
    stated = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    (target / "model.safetensors").write_bytes(stated.to_bytes(8, "little") + header + content[8 + length :])
    try:
        model = load_pretrained(AutoModelForCausalLM, str(target))
    except InputError as error:
        check_message(error)
    else:
        assert isinstance(model, PreTrainedModel)


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_any_change_of_a_configuration_is_loaded_or_refused(folder, trained, data):
    target = folder / "configuration"
    shutil.copytree(trained, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
    tree = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    small = st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | TEXT  # large numbers exhaust memory
    tree = replaced(tree, data.draw(st.sampled_from(list(places(tree)))), data.draw(small | st.lists(small)))
    (target / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    try:
        load_pretrained(AutoModelForCausalLM, str(target))
    except InputError as error:
        check_message(error)
