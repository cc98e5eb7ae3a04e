"""Export to the Hub: a repository's contents, its use without the package, and uploads to a local server."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import FakeHub, talk_to
from huggingface_hub import ModelCard
from pictures import is_drawn
from safetensors.torch import load_file
from tiny_models import tiny_lm
from tiny_runs import TRANSLATION_CONFIG, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from moe_hf.commands import evaluate_lm, evaluate_translation
from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.errors import InputError
from moe_hf.families import FAMILIES
from moe_hf.hub import export, push, round_weights, with_code
from moe_hf.training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from moe_hf.training.lm import train_lm
from moe_hf.training.translation import train_translation

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("classes_as_before")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{model type: folder of a training of four steps}."""
    folder = tmp_path_factory.mktemp("hub")
    write_config(folder)
    train_lm(*parse_arguments([str(folder / "config.yaml")]))
    (folder / "pairs.en").write_text("the dog sees the cat\nthe cat sleeps\n" * 6, encoding="utf-8")
    (folder / "pairs.de").write_text("der Hund sieht die Katze\ndie Katze schläft\n" * 6, encoding="utf-8")
    paths = {
        f"{part}_{side}_files": [f"{folder}/pairs.{language}"]
        for part in ("train", "validation")
        for side, language in (("source", "en"), ("target", "de"))
    }
    paths |= {"source_language": "en", "target_language": "de"}
    paths |= {"cache_dir": f"{folder}/cache", "output_dir": f"{folder}/translation"}
    config = folder / "translation.yaml"
    config.write_text(TRANSLATION_CONFIG + yaml.safe_dump(paths), encoding="utf-8")
    classes = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)
    train_translation(*parse_arguments([str(config)], classes))
    return {"lstm_moe": folder / "run", "gnmt_moe": folder / "translation"}


def copy_of(run, folder):
    """A run without its history of the experts, whose plot takes most of the time of an export."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("expert_history.csv"))


def run_process(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repository_is_complete(family, runs, tmp_path):
    export(str(runs[family]), tmp_path / "repository")
    config = json.loads((tmp_path / "repository" / "config.json").read_text())
    assert config["auto_map"] == FAMILIES[family].auto_map
    assert "local" not in (tmp_path / "repository" / "tokenizer_config.json").read_text()
    names = {path.name for path in (tmp_path / "repository").iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "README.md", "moe.py"} <= names


def test_repositories_work_without_the_package(runs, tmp_path):
    arguments = []
    for family, run in runs.items():
        export(str(run), tmp_path / family / "repository")
        model = FAMILIES[family].auto_class.from_pretrained(run)
        inputs = {"input_ids": torch.tensor([[5, 7, 9, 4]])}
        if family == "gnmt_moe":
            inputs["decoder_input_ids"] = torch.tensor([[1, 5, 6]])
        torch.save((inputs, model(**inputs).logits.detach()), tmp_path / family / "expected.pt")
        arguments += [FAMILIES[family].auto_class.__name__, tmp_path / family / "repository", tmp_path / family]
    script = ROOT / "tests" / "helpers" / "use_without_package.py"
    output = run_process(script, *arguments, HF_MODULES_CACHE=f"{tmp_path}/modules")
    assert output.count("works without the package") == len(runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_has_the_runs_numbers_and_its_command(family, runs, tmp_path):
    export(str(runs[family]), tmp_path / "repository", repo_id="me/model")
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    results = json.loads((runs[family] / "eval_results.json").read_text())
    key, label = {"lstm_moe": ("perplexity_per_word", "perplexity per word"), "gnmt_moe": ("chrf", "chrF")}[family]
    measured = {result.metric_name: result for result in card.data.eval_results}
    assert measured[label].metric_value == pytest.approx(results[f"eval_{key}"], abs=1e-4)
    assert f"| {label} | {results[f'eval_{key}']:.2f} |" in card.text
    assert measured[label].dataset_name != "unknown" and measured[label].dataset_name in card.text
    assert card.data.pipeline_tag == {"lstm_moe": "text-generation", "gnmt_moe": "translation"}[family]
    run = yaml.safe_load((runs[family] / "run.yaml").read_text())
    shown = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert run.pop("cache_dir") and shown.keys() == run.keys() and shown["output_dir"] == "runs/model"
    files = {key: [Path(path).name for path in value] for key, value in run.items() if key.endswith("_files")}
    assert shown == run | files | {"output_dir": "runs/model"}
    # The user's folders are private.
    assert str(runs[family].parent) not in (tmp_path / "repository" / "README.md").read_text()
    assert 'from_pretrained("me/model"' in card.text
    assert is_drawn(tmp_path / "repository" / "expert_history.png")


@pytest.mark.parametrize(
    ("trained_with", "shown"),
    [("{run}", "me/model"), ("runs/sweep/tokenizer", "me/model"), ("someone/tokenizer", "someone/tokenizer")],
)
def test_the_cards_arguments_name_no_tokenizer_of_this_machine(trained_with, shown, runs, tmp_path):
    trained = copy_of(runs["lstm_moe"], tmp_path / "run")
    arguments = yaml.safe_load((trained / "run.yaml").read_text())
    arguments["tokenizer_name_or_path"] = trained_with.format(run=trained)
    (trained / "run.yaml").write_text(yaml.safe_dump(arguments))
    export(str(trained), tmp_path / "repository", repo_id="me/model")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["tokenizer_name_or_path"] == shown


@pytest.mark.parametrize(
    ("family", "arguments", "given", "shown"),
    [
        ("gnmt_moe", {}, None, ["en", "de"]),
        ("gnmt_moe", {"train_pairs": [{"parallel_files": {"en": "a", "cs": "b"}}]}, None, ["en", "de", "cs"]),
        ("gnmt_moe", {"source_language": None, "target_language": None}, None, None),
        ("gnmt_moe", {}, ["fr"], ["fr"]),
        ("lstm_moe", {}, None, None),
        ("lstm_moe", {}, ["en"], ["en"]),
    ],
)
def test_the_card_has_the_languages(family, arguments, given, shown, runs, tmp_path):
    trained = copy_of(runs[family], tmp_path / "run")
    run = yaml.safe_load((trained / "run.yaml").read_text()) | arguments
    (trained / "run.yaml").write_text(yaml.safe_dump(run))
    export(str(trained), tmp_path / "repository", repo_id="me/model", language=given)
    assert ModelCard.load(tmp_path / "repository" / "README.md").data.language == shown


@pytest.mark.parametrize(("beams", "shown"), [({}, "greedy search"), ({"eval_num_beams": 4}, "4 beams")])
def test_the_card_says_how_the_training_translated(beams, shown, runs, tmp_path):
    trained = copy_of(runs["gnmt_moe"], tmp_path / "run")
    arguments = yaml.safe_load((trained / "run.yaml").read_text()) | beams
    (trained / "run.yaml").write_text(yaml.safe_dump(arguments))
    export(str(trained), tmp_path / "repository", repo_id="me/model")
    assert f"; translations by {shown}." in (tmp_path / "repository" / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_evaluations_are_on_the_card_with_their_commands(family, runs, tmp_path, capsys):
    model, text = copy_of(runs[family], tmp_path / "model"), tmp_path / "other.txt"
    text.write_text("the dog sees the cat\nthe cat sleeps\n" * 20, encoding="utf-8")
    command, main, arguments = {
        "lstm_moe": ("evaluate-lm", evaluate_lm.main, [str(text), "--batch_size", "2"]),
        "gnmt_moe": ("evaluate-translation", evaluate_translation.main, [str(text), str(text), "--num_beams", "2"]),
    }[family]
    output = ["--output", str(tmp_path / "out.txt")] if family == "gnmt_moe" else []  # not a part of the result
    for _ in range(2):  # a repeated evaluation replaces the first
        assert main([str(model), "--record", *arguments, *output]) == 0
    printed = dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines() if " = " in line)

    export(str(model), tmp_path / "repository", repo_id="me/model")
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    shown = [Path(argument).name if argument.startswith("/") else argument for argument in arguments]
    assert card.text.count(shlex.join(["moe-hf", command, "me/model", *shown])) == 1
    assert str(tmp_path) not in (tmp_path / "repository" / "README.md").read_text()
    value = float(printed["eval_perplexity_per_word"])
    assert f"| perplexity per word | {value:.2f} |" in card.text.split("me/model", 2)[2]
    recorded = [result for result in card.data.eval_results if text.name in result.dataset_name]
    assert value in [pytest.approx(result.metric_value, abs=1e-4) for result in recorded]


def test_a_record_needs_a_folder(capsys):
    assert evaluate_lm.main(["me/model", "text.txt", "--record"]) == 1
    assert "model='me/model' is not a folder" in capsys.readouterr().err


def test_a_card_without_a_training_says_so(tmp_path):
    write_model_and_tokenizer(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "repository")
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    assert "The training is unknown" in card.text and not card.data.eval_results


def write_model_and_tokenizer(folder):
    from moe_hf.data.tokenizers import train_tokenizer
    from moe_hf.demo.text_corpus import generate_lines

    tiny_lm(torch.float32).save_pretrained(folder)
    train_tokenizer(generate_lines(20, seed=0), kind="word", vocab_size=20).save_pretrained(folder)


def test_large_weights_are_split(runs, tmp_path):
    export(str(runs["lstm_moe"]), tmp_path / "repository", max_shard_size="3KB")
    assert len(list((tmp_path / "repository").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "repository")
    torch.testing.assert_close(model.state_dict(), AutoModelForCausalLM.from_pretrained(runs["lstm_moe"]).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weights_take_half_the_space_and_load_in_the_models_dtype(family, runs, tmp_path):
    run = copy_of(runs[family], tmp_path / "run")
    export(str(run), tmp_path / "whole")
    export(str(run), tmp_path / "half", stored_dtype="bfloat16")
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert half.keys() == whole.keys()  # tied weights once
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}
    model = FAMILIES[family].auto_class.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(state[name], weight.bfloat16().float()) for name, weight in whole.items())


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = tiny_lm(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(InputError, match="stored_dtype=float16: the weights .* exceed its largest number"):
        round_weights(model, "float16")


def test_the_card_has_the_origin_of_the_data(runs, tmp_path):
    run = copy_of(runs["lstm_moe"], tmp_path / "run")
    export(str(run), tmp_path / "repository", data="Sentences by volunteers, CC BY 2.0.")
    assert (
        "## Data\n\nSentences by volunteers, CC BY 2.0.\n"
        in ModelCard.load(tmp_path / "repository" / "README.md").text
    )


def test_several_evaluations_share_a_table(runs, tmp_path, capsys):
    model = copy_of(runs["gnmt_moe"], tmp_path / "model")
    for name in ("one", "two"):
        for language in ("en", "de"):
            (tmp_path / f"{name}.{language}").write_text("the dog sees the cat\n" * 3, encoding="utf-8")
        files = [str(tmp_path / f"{name}.{language}") for language in ("en", "de")]
        assert evaluate_translation.main([str(model), *files, "--num_beams", "1", "--record"]) == 0
    export(str(model), tmp_path / "repository", repo_id="me/model")
    text = ModelCard.load(tmp_path / "repository" / "README.md").text
    assert text.count("moe-hf evaluate-translation me/model") == 2
    assert "| files | BLEU | BLEU, lowercase | chrF |" in text and text.count("\n- BLEU: `nrefs:1|case:mixed|") == 1
    assert all(f"\n| {name}.en → {name}.de | " in text for name in ("one", "two"))


def test_the_command_uploads_a_repository(runs, tmp_path, monkeypatch, call_command):
    with FakeHub() as hub:
        talk_to(hub.url, monkeypatch)
        arguments = (runs["gnmt_moe"], "me/translator", "--private", "--language", "de", "cs")
        status, output, _ = call_command("push", *arguments)
        assert status == 0 and f"{hub.url}/me/translator/commit" in output
        assert hub.private == {"me/translator": True}
        export(str(runs["gnmt_moe"]), tmp_path / "expected", repo_id="me/translator", language=["de", "cs"])
        expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
        assert {name: data for name, data in hub.files["me/translator"].items() if name in expected} == expected


def test_a_second_upload_replaces_the_weights_of_the_first(runs, monkeypatch, call_command):
    with FakeHub() as hub:
        talk_to(hub.url, monkeypatch)
        for options in ([], ["--max_shard_size", "1KB"], []):
            assert call_command("push", runs["lstm_moe"], "me/model", *options)[0] == 0
            weights = {name for name in hub.files["me/model"] if ".safetensors" in name}
            assert ("model.safetensors" in weights) == (not options)
            assert (len(weights) == 1) == (not options)
            assert {"README.md", "config.json", "tokenizer.json"} <= set(hub.files["me/model"])


PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
import moe_hf
from moe_hf.hub import with_code
model = with_code(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.push_to_hub("me/model")
tokenizer.push_to_hub("me/model")
arguments = TrainingArguments(output_dir=sys.argv[2] + "/trained", hub_model_id="me/trained", report_to="none",
                              max_steps=1, save_strategy="no", use_cpu=True, push_to_hub=True, disable_tqdm=True)
ids = tokenizer("two and two")["input_ids"]
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
"""
LOAD = """
import sys
sys.modules["moe_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("me/model", "me/trained"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    print(name, AutoTokenizer.from_pretrained(name, trust_remote_code=True)("two").input_ids, type(model).__name__)
"""


def test_model_tokenizer_and_trainer_push_and_the_repository_loads_from_there(runs, tmp_path):
    with FakeHub() as hub:
        caches = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        run_process("-c", PUSH, runs["lstm_moe"], tmp_path, **hub.environment, **caches)
        for repository in ("me/model", "me/trained"):
            files = hub.files[repository]
            assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_lstm_moe.py"} <= set(files)
        output = run_process("-c", LOAD, **hub.environment, **caches)
        tokens = AutoTokenizer.from_pretrained(runs["lstm_moe"])("two").input_ids
        assert output.splitlines() == [f"{name} {tokens} LstmMoeForCausalLM" for name in ("me/model", "me/trained")]


def test_bad_input_is_named(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="folder=.*full must be new or empty"):
        export(str(runs["lstm_moe"]), tmp_path / "full")
    with pytest.raises(InputError, match="model=nowhere/at/all"):
        export("nowhere/at/all", tmp_path / "new")
    with pytest.raises(InputError, match="repo='a/b/c'"):
        push(str(runs["lstm_moe"]), "a/b/c")
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="model_type='bert', expected one of"):
        export(str(tmp_path / "bert"), tmp_path / "new")
    with pytest.raises(ValueError, match="model=BertModel must be one of GnmtMoe"):
        with_code(bert)
