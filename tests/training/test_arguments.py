"""Arguments from YAML files and from the command line; the shipped configurations."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml

from moe_hf import GnmtMoeConfig, LstmMoeConfig
from moe_hf.data.arguments import DataArguments, TranslationDataArguments
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.demo.text_corpus import generate_lines
from moe_hf.errors import InputError
from moe_hf.experiments.stored_facts import FactsArguments
from moe_hf.experiments.sweep import SweepArguments, translation_baseline_runs
from moe_hf.training.arguments import (
    LmModelArguments,
    MoeTrainingArguments,
    TranslationModelArguments,
    TranslationTrainingArguments,
    changed_arguments,
    parse_arguments,
)
from moe_hf.training.runs import new_config

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - set(FOLDER.glob("accelerate/*")))  # those are for `accelerate launch`
TEXTS = {path: path.read_text(encoding="utf-8") for path in CONFIGS}
TRANSLATION_CONFIGS = [path for path in CONFIGS if re.search("encoder_layer_pattern|train_source_files", TEXTS[path])]
BASELINE_CONFIGS = [path for path in TRANSLATION_CONFIGS if "\nbaselines:" in TEXTS[path]]
OWN_TRANSLATION_CONFIGS = [  # a configuration of baselines may be without a model of this package
    path for path in TRANSLATION_CONFIGS if "encoder_layer_pattern" in TEXTS[path] or path not in BASELINE_CONFIGS
]
LM_CONFIGS = [path for path in CONFIGS if path not in TRANSLATION_CONFIGS]
LM_CLASSES = (LmModelArguments, DataArguments, MoeTrainingArguments)
TRANSLATION_CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)


def classes_of(path) -> tuple[type, ...]:
    classes = TRANSLATION_CLASSES if path in TRANSLATION_CONFIGS else LM_CLASSES
    classes += (SweepArguments,) * bool(re.search("^(variants|baselines):", TEXTS[path], flags=re.M))
    return classes + (FactsArguments,) * (path.name == "stored-facts.yaml")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}/run\n{text}" if text.strip() else text, encoding="utf-8")
        return str(path)

    return write


def test_yaml_gives_every_kind_of_argument(yaml_file):
    text = """
        hidden_size: 24
        layer_pattern: [moe, lstm]
        dropout: 0.25
        carry_state: true
        train_files: ["${SOMEWHERE}/a.txt"]
        learning_rate: 1e-3
        importance_loss_coef_schedule: {0: 0.1, 100: 0.01}
    """.replace("        ", "")
    model, data, training = parse_arguments([yaml_file(text)])
    assert (model.hidden_size, model.layer_pattern, model.dropout) == (24, ["moe", "lstm"], 0.25)
    assert model.config_arguments() == {"hidden_size": 24, "layer_pattern": ["moe", "lstm"], "dropout": 0.25}
    assert data.carry_state is True and data.train_files == ["${SOMEWHERE}/a.txt"]
    assert training.learning_rate == 0.001 and training.lr_scheduler_type == "inverse_sqrt"
    assert training.importance_loss_coef_schedule == {0: 0.1, 100: 0.01}


def test_command_line_wins_over_the_file(yaml_file):
    path = yaml_file("hidden_size: 24\nnum_experts: 8\ncarry_state: true\nseed: 5\n")
    model, data, training = parse_arguments([path, "--num_experts", "16", "--carry_state", "false", "--seed", "6"])
    assert (model.hidden_size, model.num_experts, data.carry_state, training.seed) == (24, 16, False, 6)


def test_without_a_file_the_command_line_is_enough(tmp_path):
    model, _, training = parse_arguments(["--output_dir", str(tmp_path), "--layer_pattern", "lstm", "moe"])
    assert model.layer_pattern == ["lstm", "moe"] and training.output_dir == str(tmp_path)


@pytest.mark.parametrize("name", ["factored_adam", "adamw_torch", "sgd"])
def test_optimizer_is_ours_or_one_of_the_librarys(yaml_file, name):
    assert parse_arguments([yaml_file(f"optim: {name}")])[2].optim == name
    assert parse_arguments([yaml_file("seed: 1"), "--optim", name])[2].optim == name
    assert parse_arguments([yaml_file("seed: 1")])[2].optim == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("perplexity_per_word", False), ("eval_bits_per_word", False), ("loss", False), ("bleu", True), (None, None)],
)
def test_a_lower_perplexity_is_better(yaml_file, metric, expected):
    options = ["--metric_for_best_model", metric] if metric else []
    assert parse_arguments([yaml_file("seed: 1"), *options])[2].greater_is_better is expected


def test_keywords_are_checked_as_a_file_is(tmp_path):
    keywords = {"output_dir": tmp_path / "run", "train_files": [tmp_path / "a.txt"], "num_experts": "8", "fsdp": None}
    model, data, training = parse_arguments([], keywords=keywords)
    assert (model.num_experts, data.train_files, training.seed) == (8, [str(tmp_path / "a.txt")], 42)
    with pytest.raises(InputError, match="^seed is empty: give a whole number"):
        parse_arguments([], keywords=keywords | {"seed": None})
    with pytest.raises(InputError, match="^carry_state=3 must be true or false"):
        parse_arguments([], keywords=keywords | {"carry_state": 3})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], None), (["--resume_from_checkpoint"], "last"), (["--resume_from_checkpoint", "some/folder"], "some/folder")],
)
def test_bare_resume_from_checkpoint_means_the_last(yaml_file, arguments, expected):
    assert parse_arguments([yaml_file("seed: 1"), *arguments])[2].resume_from_checkpoint == expected


def test_schedule_on_the_command_line_is_json(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--load_loss_coef_schedule", '{"0": 0.1, "100": 0}']
    schedule = parse_arguments(arguments)[2].load_loss_coef_schedule
    assert schedule == {"0": 0.1, "100": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 8", "no argument is named 'hiden_size', did you mean 'hidden_size'"),
        ("xyzzy: 8", "no argument is named 'xyzzy'$"),
        ("dropout: [0.1", "config.yaml is not valid YAML: .*line"),
        ("num_experts: many", "num_experts.*'many'"),
        ("eval_strategy: sometimes", "sometimes"),
        ("optim: adam", "optim='adam' is not known, use one of factored_adam, adamw_torch, .*adafactor"),
    ],
)
def test_error_in_the_file_is_one_line_that_names_it(yaml_file, text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_arguments([yaml_file(text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [(" ", "NoneType"), ("- a\n- b\n", "list"), ("hello", "str")])
def test_file_that_is_not_a_mapping_is_refused(tmp_path, text, kind):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"config.yaml holds {kind}, expected 'name: value' lines"):
        parse_arguments([str(path)])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml does not exist"):
        parse_arguments([str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hiden_size", "8"], "'--hiden_size', did you mean '--hidden_size'"),
        (["--num_experts", "many"], "num_experts.*'many'"),
        (["--save_strategy", "sometimes"], "save_strategy.*'sometimes'"),
        (["stray"], "stray"),
        (["--importance_loss_coef_schedule", '{"0": '], "column"),
    ],
)
def test_error_on_the_command_line_is_one_line_that_names_it(yaml_file, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_arguments([yaml_file("seed: 1"), *arguments])
    assert "\n" not in str(caught.value)


def test_variables_are_expanded_in_every_path(yaml_file, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_HF_PLACE", str(tmp_path))
    file = yaml_file('cache_dir: "${MOE_HF_PLACE}/cache"')
    options = ["--output_dir", "${MOE_HF_PLACE}/new", "--use_cpu", "true"]
    options += ["--tokenizer_name_or_path", "${MOE_HF_PLACE}/t", "--model_name_or_path", "~/m"]
    model, data, training = parse_arguments([file, *options])
    assert training.output_dir == f"{tmp_path}/new" and data.cache_dir == f"{tmp_path}/cache"
    assert data.tokenizer_name_or_path == f"{tmp_path}/t" and model.model_name_or_path == os.path.expanduser("~/m")
    monkeypatch.delenv("MOE_HF_PLACE")
    with pytest.raises(InputError, match="tokenizer_name_or_path: '.*/t' needs the environment variable MOE_HF_PLACE"):
        parse_arguments([yaml_file("seed: 1"), *options])


@pytest.mark.parametrize(
    ("arguments", "config"), [(LmModelArguments, LstmMoeConfig), (TranslationModelArguments, GnmtMoeConfig)]
)
def test_model_arguments_are_those_of_the_configuration(arguments, config):
    names = {field.name for field in dataclasses.fields(arguments)}
    assert names - {"model_name_or_path", "experts_implementation"} <= {f.name for f in dataclasses.fields(config)}


@pytest.mark.parametrize("path", LM_CONFIGS, ids=[path.name for path in LM_CONFIGS])
def test_shipped_configuration_describes_a_model(path, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_HF_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, data, *_ = parse_arguments([str(path), "--output_dir", "run", "--use_cpu", "true"], classes_of(path))
    tokenizer = train_tokenizer(generate_lines(20, seed=0), kind="word", vocab_size=50)
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: data.vocab_size)
    config = new_config(LstmMoeConfig, model, tokenizer)
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    for name, value in model.config_arguments().items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("path", OWN_TRANSLATION_CONFIGS, ids=[path.name for path in OWN_TRANSLATION_CONFIGS])
def test_shipped_configuration_describes_a_translation_model(path):
    model, data, *_ = parse_arguments([str(path), "--output_dir", "run", "--use_cpu", "true"], classes_of(path))
    config = GnmtMoeConfig(vocab_size=data.vocab_size, **model.config_arguments())
    assert model.config_arguments()
    for name, value in model.config_arguments().items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("path", BASELINE_CONFIGS, ids=[path.name for path in BASELINE_CONFIGS])
def test_shipped_baselines_are_translation_models_of_transformers(path):
    parsed = parse_arguments([str(path), "--output_dir", "run", "--use_cpu", "true"], classes_of(path))
    _, data, training, sweep = parsed
    runs = translation_baseline_runs(data, training, sweep.baselines, seeds=[1])  # refuses other models
    assert [run.name for run in runs] == list(sweep.baselines) and runs


def test_configurations_are_found():
    assert len(TRANSLATION_CONFIGS) >= 6 and set(TRANSLATION_CONFIGS) == {*OWN_TRANSLATION_CONFIGS, *BASELINE_CONFIGS}
    assert len(LM_CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_changed_arguments_are_a_configuration_that_says_the_same(path, tmp_path):
    classes = classes_of(path)
    parsed = parse_arguments([str(path), "--use_cpu", "true", "--report_to", "none"], classes)
    changed = changed_arguments(*parsed)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    again = parse_arguments([str(tmp_path / "run.yaml")], classes)
    for one, other in zip(parsed, again, strict=True):
        assert str(one) == str(other)
    defaults = changed_arguments(*(cls(use_cpu=True) if "Training" in cls.__name__ else cls() for cls in classes))
    assert set(defaults) == {"output_dir", "use_cpu"} and len(changed) > 5
