"""The previous release's names still work with a warning that gives the new name; old and new together are refused."""

import argparse
import importlib
import json
import logging
import sys
import warnings

import pytest
import yaml

from moe_hf.commands.train_translation import CLASSES
from moe_hf.errors import InputError
from moe_hf.experiments.sweep import SweepArguments
from moe_hf.model_card_run import read_run
from moe_hf.old_names import MEMBERS, MODULES, with_new_options
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.checkpoints import check_same_run

OLD = {"words_per_batch": "tokens_per_batch", "eval_words_per_batch": "eval_tokens_per_batch"}


@pytest.fixture
def config(tmp_path):
    """Writes a configuration of a translation run, and names it."""

    def write(**values):
        values = {"output_dir": str(tmp_path / "run"), "use_cpu": True} | values
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return str(tmp_path / "config.yaml")

    return write


def value_of(name, parsed):
    return next(getattr(arguments, name) for arguments in parsed if hasattr(arguments, name))


@pytest.mark.parametrize("old", OLD)
def test_an_old_key_works_and_warns_in_one_line(old, config, caplog):
    parsed = parse_arguments([config(**{old: 123})], CLASSES)
    assert value_of(OLD[old], parsed) == 123
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert f"config.yaml: {old} is now called {OLD[old]}" in record.getMessage()


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("form", ["--{} 123", "--{}=123"])
def test_an_old_option_works_and_warns_in_one_line(old, form, config, caplog):
    parsed = parse_arguments([config(), *form.format(old).split()], CLASSES)
    assert value_of(OLD[old], parsed) == 123
    (record,) = caplog.records
    assert record.getMessage().startswith(f"--{old} is now called --{OLD[old]}")
    dashed = parse_arguments([config(), *form.format(old.replace("_", "-")).split()], CLASSES)
    assert value_of(OLD[old], dashed) == 123


def test_new_names_do_not_warn(config, caplog):
    parse_arguments([config(tokens_per_batch=5), "--eval_tokens_per_batch", "6"], CLASSES)
    assert not caplog.records


def test_an_option_wins_over_a_key_whatever_their_names(config):
    for key, option in (("words_per_batch", "tokens_per_batch"), ("tokens_per_batch", "words_per_batch")):
        assert value_of("tokens_per_batch", parse_arguments([config(**{key: 5}), f"--{option}", "6"], CLASSES)) == 6


@pytest.mark.parametrize("names", [("words_per_batch", "tokens_per_batch"), ("tokens_per_batch", "words_per_batch")])
def test_an_old_and_a_new_name_at_once_are_refused_in_one_line(names, config):
    message = "words_per_batch is the old name of {0}tokens_per_batch, give {0}tokens_per_batch only"
    options = [f"--{name}=5" for name in names]
    with pytest.raises(InputError, match="config.yaml: " + message.format("")) as of_file:
        parse_arguments([config(**dict.fromkeys(names, 5))], CLASSES)
    with pytest.raises(InputError, match="^--" + message.format("--")) as of_options:
        parse_arguments([config(), *options], CLASSES)
    assert "\n" not in f"{of_file.value}{of_options.value}"


def test_an_old_name_of_another_task_is_unknown(config):
    """A language model has no `tokens_per_batch`."""
    with pytest.raises(InputError, match="no argument is named 'words_per_batch'"):
        parse_arguments([config(words_per_batch=5)])
    with pytest.raises(InputError, match="no argument is named '--words_per_batch'"):
        parse_arguments([config(), "--words_per_batch", "5"])


def test_a_run_of_the_release_before_is_taken_up(tmp_path):
    """Its files have old names; an argument that differs is still found."""
    (tmp_path / "run_arguments.json").write_text(json.dumps({"words_per_batch": 40, "seed": 1}))
    check_same_run(str(tmp_path), str(tmp_path / "checkpoint-5"), {"tokens_per_batch": 40, "seed": 1})
    message = "tokens_per_batch=50 differs from tokens_per_batch=40 of the run to be resumed"
    with pytest.raises(InputError, match=message):
        check_same_run(str(tmp_path), str(tmp_path / "checkpoint-5"), {"tokens_per_batch": 50, "seed": 1})
    (tmp_path / "run.yaml").write_text("words_per_batch: 40\nseed: 1\n")
    assert read_run(tmp_path) == {"tokens_per_batch": 40, "seed": 1}


def test_old_options_of_other_parsers(caplog):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens_per_batch", type=int)
    assert with_new_options(["FILE", "--batch_tokens", "5"], parser) == ["FILE", "--tokens_per_batch", "5"]
    assert "--batch_tokens is now called --tokens_per_batch" in caplog.text


def test_baselines_may_be_called_references(tmp_path, config, caplog):
    baselines = {"GPT-2": {"model_type": "gpt2"}}
    parsed = parse_arguments([config(references=baselines)], (*CLASSES, SweepArguments))
    assert parsed[-1].baselines == baselines
    assert "config.yaml: references is now called baselines" in caplog.text
    parsed = parse_arguments([config(), "--references", json.dumps(baselines)], (*CLASSES, SweepArguments))
    assert parsed[-1].baselines == baselines
    with pytest.raises(InputError, match="references is the old name of baselines, give base"):
        parse_arguments([config(references=baselines, baselines={})], (*CLASSES, SweepArguments))
    (tmp_path / "run_arguments.json").write_text(json.dumps({"reference": baselines["GPT-2"]}))
    check_same_run(str(tmp_path), str(tmp_path / "finished"), {"baseline": baselines["GPT-2"]})
    with pytest.raises(InputError, match="baseline={} differs from baseline={'model_type': 'gpt2'}"):
        check_same_run(str(tmp_path), str(tmp_path / "finished"), {"baseline": {}})


# Imports from moved modules in README, docs/, examples/ and benchmarks/ of the previous release.
IMPORTED = {
    "moe_hf.evaluation.communication": ["CollectiveCounter"],
    "moe_hf.evaluation.routing_statistics": ["LayerRouting", "collect_routing"],
    "moe_hf.evaluation.sharding_plan": ["Cluster", "plan_sharding"],
    "moe_hf.training.combined_batch": ["combine_batches"],
    "moe_hf.training.demo_corpus": ["dialect_of", "generate_lines", "prompt_of", "write_demo_corpus"],
    "moe_hf.training.evaluate": ["evaluate_lm"],
    "moe_hf.training.evaluate_translation": ["evaluate_translation"],
    "moe_hf.training.number_words_en": ["MONTHS"],
    "moe_hf.training.reference": ["ReferenceArguments", "train_reference", "train_translation_reference"],
    "moe_hf.training.tokenizers": ["train_tokenizer"],
    "moe_hf.training.translation_demo_corpus": ["write_translation_corpus"],
    "moe_hf.training.windows": ["StreamWindows", "collate_windows"],
    "moe_hf.translation": ["Translation", "Translator"],
}


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_has_the_members_of_the_new_one_and_warns(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {MODULES[old]}; ") as caught:
        module = importlib.import_module(old)
    assert len(caught) == 1
    new = importlib.import_module(MODULES[old])
    assert new.__name__ == new.__spec__.name == MODULES[old] and module is not new
    for name in IMPORTED[old]:
        assert getattr(module, name) is getattr(new, MEMBERS.get(old, {}).get(name, name))


@pytest.fixture
def old_modules_anew(monkeypatch):
    """Those that another test has imported are imported again, and warn again."""
    for old in MODULES:
        monkeypatch.delitem(sys.modules, old, raising=False)


@pytest.mark.usefixtures("old_modules_anew")
@pytest.mark.filterwarnings("error::DeprecationWarning:__main__")
def test_paths_that_did_not_move_do_not_warn():
    code = """
from moe_hf.evaluation import ops_per_timestep
from moe_hf.evaluation.metrics import load_metric
from moe_hf.generation import gnmt_beam_search
from moe_hf.hub import with_code
from moe_hf.models.balancing import balancing_loss
from moe_hf.offload import experts_device_map
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.callbacks import AuxLossCallback
from moe_hf.training.lm import train_lm
from moe_hf.training.optimizer import FactoredAdam, expert_parameters, state_bytes
from moe_hf.training.translation import train_translation
from moe_hf.upcycling import exactness
"""
    exec(code, {"__name__": "__main__"})


@pytest.mark.usefixtures("old_modules_anew")
def test_the_warning_points_at_the_line_that_imports():
    code = "\nfrom moe_hf.training.windows import StreamWindows"
    with pytest.warns(DeprecationWarning, match="moe_hf.training.windows is now moe_hf.data.windows;") as caught:
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
    assert [(warning.filename, warning.lineno) for warning in caught] == [("program.py", 2)]
    # Python shows such warnings only for the program, not for its libraries.
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
        del sys.modules["moe_hf.training.windows"]
        exec(code, {"__name__": "__main__"})
    assert len(shown) == 1


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="moe_hf.training.wimdows"):
        importlib.import_module("moe_hf.training.wimdows")
