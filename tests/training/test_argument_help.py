"""The help of the training commands: this package's arguments by default, all arguments with --help-all."""

import dataclasses
import re

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from moe_hf import GnmtMoeConfig, LstmMoeConfig, cli
from moe_hf.data.arguments import DataArguments, TranslationDataArguments
from moe_hf.training.arguments import (
    LmModelArguments,
    MoeTrainingArguments,
    TranslationModelArguments,
    TranslationTrainingArguments,
)

COMMANDS = {
    "train-lm": (LmModelArguments, DataArguments, MoeTrainingArguments),
    "train-translation": (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments),
}


@pytest.fixture
def help_of(capsys, monkeypatch):
    """Returns {argument: its help, in one line} and the whole text that a command prints."""

    def read(*words) -> tuple[dict[str, str], str]:
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        assert not end.value.code
        text = capsys.readouterr().out
        parts = re.split(r"^  --(\w+) ", text, flags=re.M)
        return {name: " ".join(part.split()) for name, part in zip(parts[1::2], parts[2::2])}, text

    return read


def names_of(*classes) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_argument_of_this_package_and_help_all_the_librarys_too(command, help_of):
    ours = names_of(*COMMANDS[command]) - names_of(TrainingArguments, Seq2SeqTrainingArguments)
    short, text = help_of(command, "--help")
    assert ours <= short.keys() and {"output_dir", "learning_rate", "max_steps", "eval_strategy"} <= short.keys()
    assert f"moe-hf {command} --help-all" in " ".join(text.split()) and text.count("\n") < 200
    everything, _ = help_of(command, "--help-all")
    batch_sizes = {"per_device_train_batch_size", "per_device_eval_batch_size"}
    assert everything.keys() == names_of(*COMMANDS[command])
    assert "adam_beta1" in everything and "adam_beta1" not in short
    assert batch_sizes.isdisjoint(short) == (command == "train-translation")


@pytest.mark.parametrize(
    ("command", "config_class"), [("train-lm", LstmMoeConfig), ("train-translation", GnmtMoeConfig)]
)
def test_help_shows_the_configurations_defaults(command, config_class, help_of):
    arguments, text = help_of(command, "--help")
    config = config_class()
    for name in ("hidden_size", "dropout", "num_experts", "moe_intermediate_size", "load_loss_coef", "gating"):
        assert arguments[name].endswith(f"(default: {getattr(config, name)})")
    assert arguments["tie_word_embeddings"].endswith("(default: false)")
    assert (
        "(default: lstm moe lstm)" in arguments["layer_pattern" if command == "train-lm" else "decoder_layer_pattern"]
    )
    assert "None" not in text


def test_help_after_a_file_shows_its_values(tmp_path, help_of):
    path = tmp_path / "config.yaml"
    path.write_text("hidden_size: 24\nlearning_rate: 0.125\n", encoding="utf-8")
    arguments, _ = help_of("train-lm", str(path), "--help")
    assert "(default: 24)" in arguments["hidden_size"] and "(default: 0.125)" in arguments["learning_rate"]


def test_help_says_what_resuming_does_here(help_of):
    text = help_of("train-lm", "--help")[0]["resume_from_checkpoint"]
    assert "[FOLDER]" in text and "last complete checkpoint of output_dir" in text
    assert "Without this argument: a new run" in text
