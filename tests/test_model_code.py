"""Training and the commands save the model's code: a folder loads by its path, with the package or without."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from tiny_models import tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import moe_hf
from moe_hf import GnmtMoeForConditionalGeneration, LstmMoeForCausalLM
from moe_hf.commands.average import average
from moe_hf.commands.prune import prune_folder
from moe_hf.commands.upcycle import upcycle_folder
from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.families import FAMILIES
from moe_hf.hub import export
from moe_hf.model_code import add_code
from moe_hf.training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from moe_hf.training.lm import train_lm
from moe_hf.training.translation import train_translation
from tests.test_hub import run_process, runs  # noqa: F401, a fixture

MODELS = {"lstm_moe": LstmMoeForCausalLM, "gnmt_moe": GnmtMoeForConditionalGeneration}
AUTO_CLASSES = {"lstm_moe": AutoModelForCausalLM, "gnmt_moe": AutoModelForSeq2SeqLM}
LOAD = """
import sys, torch, transformers
sys.modules["moe_hf"] = None  # so that importing it fails
for auto_class, folder, expected in zip(*[iter(sys.argv[1:])] * 3):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(model.state_dict(), torch.load(expected))
    print(type(model).__name__)
"""


def code_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.py")}


def assert_has_code(folder, family):
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["auto_map"] == FAMILIES[family].auto_map
    assert config["architectures"] == [AUTO_CLASSES[family].__name__]
    models = Path(moe_hf.__file__).parent / "models"
    assert code_of(folder) == {name: (models / name).read_bytes() for name in code_of(folder)}
    assert f"modeling_{family}.py" in code_of(folder)


def test_a_trained_folder_loads_without_the_package(runs, tmp_path):  # noqa: F811
    arguments = []
    for family, auto_class in AUTO_CLASSES.items():
        assert_has_code(runs[family], family)
        torch.save(MODELS[family].from_pretrained(runs[family]).state_dict(), tmp_path / family)
        arguments += [auto_class.__name__, runs[family], tmp_path / family]
    output = run_process("-c", LOAD, *arguments, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert output.splitlines() == [model.__name__ for model in MODELS.values()]


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": True}])
@pytest.mark.parametrize("family", MODELS)
def test_with_the_package_nobody_is_asked_and_its_classes_are_taken(family, arguments, runs, monkeypatch, recwarn):  # noqa: F811
    def ask(question):
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    model = AUTO_CLASSES[family].from_pretrained(runs[family], **arguments)
    AutoTokenizer.from_pretrained(runs[family], **arguments)
    assert type(model) is MODELS[family] and not recwarn.list


@pytest.mark.parametrize("family", MODELS)
def test_a_training_marks_no_class(family, runs, tmp_path):  # noqa: F811
    MODELS[family].from_pretrained(runs[family]).save_pretrained(tmp_path)
    assert not code_of(tmp_path)


def train_on(family, source, folder, *overrides):
    """Fine-tunes a run's model with the run's arguments."""
    run = yaml.safe_load((source / "run.yaml").read_text()) | {"output_dir": str(folder)}
    (folder.parent / "again.yaml").write_text(yaml.safe_dump(run))
    arguments = [str(folder.parent / "again.yaml"), "--model_name_or_path", str(source), *overrides]
    if family == "lstm_moe":
        train_lm(*parse_arguments(arguments))
    else:
        classes = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)
        train_translation(*parse_arguments(arguments, classes))


@pytest.mark.parametrize("family", MODELS)
def test_what_is_made_of_a_trained_folder_has_its_code_and_checkpoints_have_none(family, runs, tmp_path):  # noqa: F811
    text = [str(tmp_path / "text")] * (1 if family == "lstm_moe" else 2)
    Path(text[0]).write_text("two and two\nthe cat sleeps\n" * 20)
    train_on(family, runs[family], tmp_path / "tuned", "--save_strategy", "steps", "--save_steps", "2")
    checkpoints = sorted((tmp_path / "tuned").glob("checkpoint-*"))
    assert len(checkpoints) == 2 and not any(code_of(folder) for folder in checkpoints)
    for arguments in ({}, {"trust_remote_code": True}):
        model = AUTO_CLASSES[family].from_pretrained(checkpoints[0], **arguments)
        assert type(model) is MODELS[family]
    average(str(tmp_path / "tuned"), str(tmp_path / "averaged"), 2)
    prune_folder(str(runs[family]), text, str(tmp_path / "pruned"), keep=2, num_experts_per_tok=None)
    options = dict(slices=1, num_experts_per_tok=None, num_expert_groups=None, num_groups_per_tok=None, gating=None)
    options |= dict(gate_std=1.0, expert_std=0.0, seed=0)
    upcycle_folder(str(runs[family]), str(tmp_path / "upcycled"), 8, **options)
    for name in ("tuned", "averaged", "pruned", "upcycled"):
        assert_has_code(tmp_path / name, family)


@pytest.mark.parametrize("family", MODELS)
def test_an_export_of_an_export_is_the_same(family, runs, tmp_path):  # noqa: F811
    export(str(runs[family]), tmp_path / "one", repo_id="me/model")
    export(str(tmp_path / "one"), tmp_path / "two", repo_id="me/model")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    about_the_run = {"README.md", "expert_history.png"}  # unknown to the second run
    assert {name: one[name] for name in one.keys() - about_the_run} == {
        name: two[name] for name in two.keys() - about_the_run
    }
    assert code_of(tmp_path / "one") == code_of(runs[family])


def test_a_model_of_another_family_and_an_adapter_stay_as_they_are(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (tmp_path / "gpt2", tmp_path / "adapter"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        add_code(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_without_its_softmax_has_code_too(tmp_path):
    tiny_lm(torch.float32).model.save_pretrained(tmp_path)
    add_code(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["AutoModel"]


def test_a_training_uploads_its_code(runs, tmp_path, monkeypatch):  # noqa: F811
    uploads = []

    def upload(api, folder_path, **arguments):
        uploads.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr(HfApi, "whoami", lambda api: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **arguments: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    train_on("lstm_moe", runs["lstm_moe"], tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", "me/model")
    assert json.loads(uploads[-1]["config.json"])["auto_map"] == FAMILIES["lstm_moe"].auto_map
    code = code_of(runs["lstm_moe"])
    assert {name: data for name, data in uploads[-1].items() if name.endswith(".py")} == code
