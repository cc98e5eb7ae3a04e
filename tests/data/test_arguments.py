"""The arguments of translation data, from YAML and from the command line, and the sources that the arguments name."""

import json

import pytest

from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.data.pair_sources import PairSource, read_pair_sources
from moe_hf.errors import InputError
from moe_hf.training.arguments import MoeTrainingArguments, parse_arguments

FORTH = {"source_files": "a.en", "target_files": "a.de", "source_language": "en", "target_language": "de"}


def parse(tmp_path, yaml, *command_line):
    (tmp_path / "c.yaml").write_text(f"output_dir: {tmp_path}\n{yaml}")
    arguments = [str(tmp_path / "c.yaml"), *command_line]
    return parse_arguments(arguments, (TranslationDataArguments, MoeTrainingArguments))[0]


def test_flat_arguments_name_one_source(tmp_path):
    yaml = "train_source_files: [a.en]\ntrain_target_files: [a.de]\nsource_language: en\ntarget_language: de\n"
    data = parse(tmp_path, yaml, "--validation_files", "v.tsv")
    languages = {"source_language": "en", "target_language": "de"}
    assert data.train_sources() == [PairSource(source_files=["a.en"], target_files=["a.de"], **languages)]
    assert data.validation_sources() == [PairSource(files=["v.tsv"], **languages)]


def test_data_set_has_its_splits():
    data = TranslationDataArguments(dataset_name="some/set", dataset_config_name="de-en", validation_split="test")
    assert data.train_sources() == [PairSource(dataset_name="some/set", dataset_config_name="de-en", split="train")]
    assert data.validation_sources()[0].split == "test"
    data.validation_files = ["v.tsv"]
    assert data.validation_sources()[0].files == ["v.tsv"] and data.validation_sources()[0].dataset_name is None
    data.validation_pairs, data.validation_files = [FORTH], None
    assert data.validation_sources() == [PairSource(**FORTH)]
    data.validation_pairs, data.validation_split = None, None
    assert data.validation_sources() == []


def test_pairs_come_from_yaml_or_as_json_from_the_command_line(tmp_path):
    yaml = "train_pairs:\n- {source_files: a.en, target_files: a.de, source_language: en, target_language: de}\n"
    assert parse(tmp_path, yaml).train_sources() == [PairSource(**FORTH)]
    back = FORTH | {"source_language": "de", "target_language": "en", "source_files": ["b.de"]}
    data = parse(tmp_path, yaml, "--train_pairs", json.dumps([FORTH, back]))
    assert data.train_sources() == [PairSource(**FORTH), PairSource(**back)]


def test_parallel_files_stand_for_all_ordered_pairs():
    sources = read_pair_sources([{"parallel_files": {"en": "e", "de": ["d"], "fr": "f"}}], "train_pairs")
    assert [source.direction for source in sources] == ["en-de", "en-fr", "de-en", "de-fr", "fr-en", "fr-de"]
    assert (sources[3].source_files, sources[3].target_files) == (["d"], "f")


@pytest.mark.parametrize(
    "entry", ["parallel_files: {en: a, no: b}", "{source_files: a, target_files: b, target_language: no}"]
)
def test_a_language_that_yaml_takes_for_something_else_is_refused(tmp_path, entry):
    data = parse(tmp_path, f"train_pairs:\n- {entry}\n")
    with pytest.raises(InputError, match="train_pairs, entry 1: target_language=False is not text.*in quotes"):
        data.train_sources()
    quoted = parse(tmp_path, "train_pairs:\n- " + entry.replace("no", '"no"') + "\n")
    assert "no" in {source.target_language for source in quoted.train_sources()}
    with pytest.raises(InputError, match="^source_language=False is not text"):
        parse(tmp_path, "train_files: [a.tsv]\nsource_language: no\n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{", "train_pairs is not valid JSON"),
        ('{"files": "a.tsv"}', "train_pairs=.* must be a list of mappings"),
        ("[]", "train_pairs=.* must be a list of mappings, at least one"),
        (["a.tsv"], "must be a list of mappings"),
        ([FORTH, {"sources": "a"}], "train_pairs, entry 2: no field is named 'sources', did you mean 'source_files'"),
        ([{"source_files": "a"}], "entry 1: source_files=a needs target_files as well"),
        ([{"target_files": "a"}], "entry 1: target_files=a needs source_files as well"),
        ([{"source_language": "en"}], "entry 1: exactly one of"),
        ([FORTH | {"files": "a.tsv"}], "entry 1: exactly one of"),
        ([{"parallel_files": {"en": "e"}}], "entry 1: parallel_files=.* two or more"),
        (
            [{"parallel_files": {"en": "e", "de": "d"}, "files": "a"}],
            "entry 1: parallel_files=.* without other fields",
        ),
    ],
)
def test_bad_pairs_are_named(value, message):
    with pytest.raises(InputError, match=message):
        TranslationDataArguments(train_pairs=value).train_sources()


def test_data_are_needed_in_one_way_only():
    with pytest.raises(InputError, match="no training data: name train_source_files"):
        TranslationDataArguments().train_sources()
    assert TranslationDataArguments().validation_sources() == []
    with pytest.raises(InputError, match="train_pairs and train_files are given, only one"):
        TranslationDataArguments(train_pairs=[FORTH], train_files=["a.tsv"]).train_sources()
    with pytest.raises(InputError, match="^train_files and dataset_name are given, only one"):
        TranslationDataArguments(dataset_name="x", train_files=["a.tsv"]).train_sources()
    with pytest.raises(InputError, match="^validation_source_files=.* needs validation_target_files"):
        TranslationDataArguments(validation_source_files=["a"]).validation_sources()
