"""The contents of a model card: a training's numbers, direction, versions, the package, a sample; and no folder."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_runs import write_translation_config
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.evaluation.records import record_evaluation
from moe_hf.hub import export
from moe_hf.model_card_run import directions, evaluation_files, read_run, without_folders
from moe_hf.models.versions import TESTED_WITH, TRANSFORMERS
from tests.evaluation.test_bleu_tokenizers import GERMAN, SOURCES, train
from tests.test_hub import FAMILIES, runs, write_model_and_tokenizer  # noqa: F401, a fixture


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A training into two languages, with pairs as JSON text, as from the command line."""
    folder = tmp_path_factory.mktemp("multilingual")
    write_translation_config(folder, {"en": SOURCES, "de": GERMAN})
    pairs = json.dumps([{"parallel_files": {language: str(folder / f"text.{language}") for language in ("en", "de")}}])
    train(folder, "--train_pairs", pairs, "--validation_pairs", pairs)
    return folder / "run"


def card_of(source, folder):
    export(str(source), folder / "repository", repo_id="me/model")
    return (folder / "repository" / "README.md").read_text()


def sample_of(card):
    return re.search("```text\ninput:  (.*)\noutput: (.*)\n```", card).groups()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_tells_versions_and_where_the_package_is_to_be_had(family, runs, tmp_path):  # noqa: F811
    card = card_of(runs[family], tmp_path)
    for name, version in TESTED_WITH.items():
        assert f"{name} {version}" in card
    assert f"requires Transformers {TRANSFORMERS}." in card
    assert "with `pip install PATH_TO_CHECKOUT`" in card


def test_the_card_tells_the_direction(runs, multilingual, tmp_path):  # noqa: F811
    assert "| translates | en → de |" in card_of(runs["gnmt_moe"], tmp_path / "one")
    assert "| translates | en → de, de → en |" in card_of(multilingual, tmp_path / "many")
    assert "| translates |" not in card_of(runs["lstm_moe"], tmp_path / "none")


def test_without_a_training_the_direction_is_that_of_the_tokenizers_tags():
    tokenizer = train_translation_tokenizer(SOURCES, vocab_size=300, languages=["de", "zh"])
    assert directions({}, tokenizer) == "into de, zh"
    assert directions({}, train_translation_tokenizer(SOURCES, vocab_size=300)) == ""


def test_a_language_models_sample_goes_on_with_its_validation_text(runs, tmp_path):  # noqa: F811
    folder = runs["lstm_moe"]
    start = " ".join((folder.parent / "valid.txt").read_text().split()[:3])
    given, written = sample_of(card_of(folder, tmp_path))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**tokenizer(start, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert (given, written) == (start, tokenizer.decode(ids[0], skip_special_tokens=True))


def test_a_translators_sample_is_of_its_validation_data_or_a_fixed_sentence(runs, tmp_path):  # noqa: F811
    folder = shutil.copytree(runs["gnmt_moe"], tmp_path / "run")
    card = card_of(folder, tmp_path / "one")
    given, written = sample_of(card)
    assert given == "the dog sees the cat" and "the input is the beginning of its validation data" in card
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    inputs = tokenizer([given], return_tensors="pt")
    length = inputs["input_ids"].shape[1] * 3 + 10
    ids = model.generate(**inputs, num_beams=4, max_new_tokens=length, suppress_tokens=[0, 1])
    assert written == tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " ")

    run = yaml.safe_load((folder / "run.yaml").read_text()) | {"validation_source_files": ["${NOT_SET}/a.en"]}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    card = card_of(folder, tmp_path / "two")
    assert sample_of(card)[0] == "A sentence to translate." and "validation data" not in card.split("## Results")[0]


def test_a_multilingual_models_card_says_how_to_choose_the_language(multilingual, tmp_path):
    card = card_of(multilingual, tmp_path)
    assert "by 4 beams, into de; the input is" in card and sample_of(card)[0] == SOURCES[0]
    code = card.split("```python\n")[1].split("```")[0].replace("me/model", str(tmp_path / "repository"))
    printed = []
    exec(code, {"print": printed.append})  # the package's classes: it is imported here
    assert len(printed[0]) == 1 and isinstance(printed[0][0], str)


def test_a_card_names_the_files_of_pairs_without_their_folders(multilingual, tmp_path):
    run = read_run(multilingual)
    assert [Path(file).name for file in evaluation_files(run)] == ["text.en", "text.de"]
    card = card_of(multilingual, tmp_path)
    assert str(multilingual.parent) not in card and "on text.en, text.de;" in card
    results = ModelCard(card).data.eval_results
    assert {(result.dataset_type, result.dataset_name) for result in results} == {("text", "text.en, text.de")}


def test_a_file_that_is_given_as_a_text_is_one_file():
    assert evaluation_files({"validation_files": "valid.txt"}) == ["valid.txt"]
    pair = {"validation_source_files": "valid.en", "validation_target_files": ["valid.de"]}
    assert evaluation_files(pair) == ["valid.en", "valid.de"]


def test_a_dataset_of_the_hub_is_named_with_its_split(runs, tmp_path):  # noqa: F811
    folder = shutil.copytree(runs["lstm_moe"], tmp_path / "run")
    run = yaml.safe_load((folder / "run.yaml").read_text()) | {"dataset_name": "someone/texts"}
    run = {name: value for name, value in run.items() if not name.endswith("_files")}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    card = ModelCard(card_of(folder, tmp_path))
    assert card.data.eval_results[0].dataset_type == "someone/texts"
    assert card.data.eval_results[0].dataset_name == "someone/texts (validation)"
    assert sample_of(card.text)[0] == "The"


@pytest.mark.parametrize(("file", "has_variable"), [("${DATA}/a.txt", True), ("a.txt", False)])
def test_a_card_says_who_replaces_a_variable_of_its_commands(file, has_variable, runs, tmp_path):  # noqa: F811
    folder = shutil.copytree(runs["lstm_moe"], tmp_path / "run")
    metrics = {"eval_perplexity_per_word": 2.0}
    record_evaluation(str(folder), "evaluate-lm", [str(folder), file], [file], metrics)
    commands = card_of(folder, tmp_path).split("```bash\n")[1].split("```")[0].splitlines()
    assert commands[-1] == shlex.join(["moe-hf", "evaluate-lm", "me/model", file])
    assert [line.startswith("# moe-hf itself replaces ${...}") for line in commands[:-1]] == [True] * has_variable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/data/a.txt", "a.txt"),
        ("/home/me/*.txt.gz", "*.txt.gz"),
        ("--history=/home/me/a.csv", "--history=a.csv"),
        ("${MOE_HF_DATA}/a.txt", "${MOE_HF_DATA}/a.txt"),
        ("data/a.txt", "data/a.txt"),
        (["/a/b", {"source_files": "/a/c"}, 3], ["b", {"source_files": "c"}, 3]),
    ],
)
def test_absolute_paths_lose_their_folders(value, shown):
    assert without_folders(value) == shown


def test_a_model_without_a_training_has_a_sample_too(tmp_path):
    torch.manual_seed(0)
    write_model_and_tokenizer(tmp_path / "model")
    assert sample_of(card_of(tmp_path / "model", tmp_path))[0] == "The"
