"""A whole training run in this process, fine-tuning from its folder, and one-line errors for bad input."""

import gzip
import json
import math
import re

import pytest
import torch
from tiny_models import aligned
from tiny_runs import write_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf.commands.train_lm import main
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import train_lm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with train.txt, valid.txt, and the configuration `config.yaml` of a run in `run`."""
    folder = tmp_path_factory.mktemp("corpus")
    write_config(folder)
    return folder


def train(corpus, *overrides):
    return train_lm(*parse_arguments([str(corpus / "config.yaml"), *map(str, overrides)]))


@pytest.fixture(scope="module")
def trained(corpus):
    """The trainer and its metrics, after a run with carried state."""
    return train(corpus, "--carry_state", "true", "--eval_strategy", "steps", "--eval_steps", "3")


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).logits


def test_run_leaves_model_tokenizer_and_history(corpus, trained):
    trainer, metrics = trained
    names = {path.name for path in (corpus / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"expert_history.csv", "trainer_state.json", "train_results.json", "eval_results.json"} <= names
    rows = (corpus / "run" / "expert_history.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["2", "layers.1"], ["4", "layers.1"]]
    assert json.loads((corpus / "run" / "eval_results.json").read_text()) == metrics
    assert not any("layers." in name for name in metrics)
    assert math.isfinite(metrics["eval_perplexity_per_word"])


def test_model_loads_back_with_the_same_logits(corpus, trained):
    model = AutoModelForCausalLM.from_pretrained(corpus / "run")
    assert torch.equal(logits_of(aligned(model)), logits_of(trained[0].model))
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run")
    assert tokenizer.get_vocab() == trained[0].processing_class.get_vocab()
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)


def test_fine_tuning_goes_on_from_the_folder(corpus, trained, tmp_path):
    overrides = ["--model_name_or_path", corpus / "run", "--output_dir", tmp_path / "tuned", "--learning_rate", "0"]
    trainer, _ = train(corpus, *overrides, "--vocab_size", "20", "--dropout", "0.25")
    assert torch.equal(logits_of(aligned(trainer.model)), logits_of(trained[0].model))
    assert trainer.model.config.dropout == 0.25
    assert trainer.processing_class.get_vocab() == trained[0].processing_class.get_vocab()


@pytest.mark.parametrize("carry_state", ["true", "false"])
def test_short_validation_text_is_evaluated_whole(corpus, tmp_path, carry_state):
    path = tmp_path / "valid.txt"
    path.write_text("one , two , three , four .\nthe day after .\n", encoding="utf-8")  # 14 words: 13 positions
    overrides = ["--output_dir", tmp_path / "run", "--max_steps", "1", "--window_length", "3"]
    overrides += ["--validation_files", path, "--per_device_eval_batch_size", "16", "--carry_state", carry_state]
    trainer, metrics = train(corpus, *overrides)
    ids = trainer.processing_class(path.read_text().replace("\n", " <eos> ").split(), is_split_into_words=True)
    tokens = torch.tensor(ids["input_ids"])
    assert len(tokens) == 14
    model, nll = trainer.model.eval(), 0.0
    for start in range(0, 13, 4):  # 13 positions have room for 4 rows of 3, so the rows have 4, 4, 4 and 1
        row, targets = tokens[start : min(start + 4, 13)], tokens[start + 1 : start + 5]
        for piece, goals in [(row, targets)] if carry_state == "true" else zip(row.split(3), targets.split(3)):
            with torch.no_grad():
                nll += cross_entropy(model(piece[None]).logits[0], goals, reduction="sum").item()
    assert metrics["eval_loss"] == pytest.approx(nll / 13, rel=1e-5)
    assert metrics["eval_perplexity_per_word"] == pytest.approx(math.exp(nll / 14), rel=1e-5)


def corrupt_gzip(folder):
    path = folder / "text.gz"
    path.write_bytes(gzip.compress(b"a b c\n" * 9)[:-9])
    return path


def file_with(content: bytes):
    def write(folder):
        path = folder / "text.txt"
        path.write_bytes(content)
        return path

    return write


def broken_checkpoint(folder):
    path = folder / "checkpoint-3"
    path.mkdir()
    (path / "trainer_state.json").write_text("{")
    return path


def full_folder(folder):
    (folder / "notes.txt").write_text("precious")
    return folder


# Overrides, where a function creates a file and returns its path, and the words of the one-line error.
BAD_INPUT = {
    "k exceeds n": (["--num_experts_per_tok", "5"], "num_experts_per_tok=5 exceeds num_experts=4"),
    "gating": (["--gating", "softmux"], "gating='softmux' is not known, use one of noisy_top_k, softmax_top_k"),
    "layer": (["--layer_pattern", "lstm", "gru"], "layer_pattern=.*'gru' is not a layer, use lstm or moe"),
    "dropout": (["--dropout", "1.5"], "dropout=1.5 must be"),
    "type": (["--num_experts", "many"], "num_experts.*'many'"),
    "misspelt name": (["--hiden_size", "3"], "'--hiden_size', did you mean '--hidden_size'"),
    "experts implementation": (
        ["--experts_implementation", "magic"],
        'experts_implementation="magic"` is not supported.*eager',
    ),
    "schedule": (["--load_loss_coef_schedule", '{"0": -1}'], "load_loss_coef_schedule={.*0"),
    "tokenizer kind": (["--tokenizer_kind", "char"], "tokenizer_kind='char' is not known, use one of bpe, word"),
    "empty file": (["--train_files", file_with(b"")], "text.txt: the file has no text"),
    "directory": (["--train_files", lambda folder: folder], "is a folder"),
    "corrupt gzip": (["--train_files", corrupt_gzip], "text.gz: cannot be read"),
    "not UTF-8": (["--train_files", file_with(b"a b c\nd\xff\n")], "text.txt: line 2 is not UTF-8"),
    "short text": (["--train_files", file_with(b"a b c\n")], "4 tokens, fewer than window_length=7"),
    "few rows": (["--train_files", file_with(b"a b c d e f g h i j\n"), "--carry_state"], "num_rows=4 .* at most 1"),
    "short validation text": (["--validation_files", file_with(b"a b\n")], "3 tokens, fewer than window_length=7"),
    "unset variable": (["--train_files", "${MOE_HF_UNSET}/a.txt"], "variable MOE_HF_UNSET, which is not set"),
    "no text": (["--train_files"], "train_files"),
    "broken checkpoint": (["--resume_from_checkpoint", broken_checkpoint], "checkpoint-3 is incomplete: trainer"),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
    "full folder": (["--output_dir", full_folder], "output_dir=.* is not empty"),
    "model": (["--model_name_or_path", full_folder], "name_or_path=.*cannot be loaded"),
}


def test_the_callers_arguments_stay_as_they_were(corpus, tmp_path):
    options = ["--output_dir", str(tmp_path), "--max_steps", "1", "--per_device_eval_batch_size", "64"]
    arguments = parse_arguments([str(corpus / "config.yaml"), *options])
    before = arguments[2].to_dict()
    trainer, _ = train_lm(*arguments)
    assert arguments[2].to_dict() == before
    assert trainer.args.per_device_eval_batch_size < before["per_device_eval_batch_size"]


def assert_one_line_error(capfd, corpus, overrides, message):
    capfd.readouterr()
    assert main([str(corpus / "config.yaml"), *map(str, overrides)]) == 1
    output = capfd.readouterr().err
    lines = output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(name, capfd, corpus, tmp_path):
    overrides, message = BAD_INPUT[name]
    values = [override(tmp_path) if callable(override) else override for override in overrides]
    if "--output_dir" not in values:
        values += ["--output_dir", tmp_path / "run"]
    assert_one_line_error(capfd, corpus, values, message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--num_experts_per_tok", "5"], r"run: cannot be loaded \(num_experts_per_tok=5 exceeds num_experts=4\)"),
        (["--gating", "softmux"], r"run: cannot be loaded \(gating='softmux' is not known"),
    ],
)
def test_bad_change_of_a_fine_tuned_model_is_one_line(capfd, corpus, trained, tmp_path, overrides, message):
    overrides = ["--model_name_or_path", corpus / "run", "--output_dir", tmp_path / "tuned", *overrides]
    assert_one_line_error(capfd, corpus, overrides, message)


def test_tokenizer_larger_than_the_model_is_refused(capfd, corpus, trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run")
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(tmp_path / "larger")
    overrides = ["--model_name_or_path", corpus / "run", "--tokenizer_name_or_path", tmp_path / "larger"]
    overrides += ["--output_dir", tmp_path / "tuned"]
    message = "tokenizer_name_or_path=.*larger: the tokenizer has 51 tokens, more than vocab_size=50"
    assert_one_line_error(capfd, corpus, overrides, message)


def test_evaluation_without_validation_text_is_refused(capfd, corpus, tmp_path):
    path = tmp_path / "config.yaml"
    lines = (corpus / "config.yaml").read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "validation_files" not in line), encoding="utf-8")
    overrides = ["--eval_strategy", "epoch", "--output_dir", tmp_path / "run"]
    assert_one_line_error(capfd, tmp_path, overrides, "eval_strategy=epoch needs validation_files")


def test_a_refused_run_leaves_nothing_behind(capfd, corpus, tmp_path):
    values = ["--output_dir", tmp_path / "run", "--gating", "softmux"]
    assert_one_line_error(capfd, corpus, values, "softmux")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_changed_argument_on_resumption_is_one_line(capfd, corpus, tmp_path):
    folder = ["--output_dir", tmp_path / "run", "--max_steps", "2", "--save_strategy", "steps"]
    folder += ["--save_steps", "1", "--lr_scheduler_type", "cosine_with_min_lr"]
    folder += ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}']
    train(corpus, *folder)
    train(corpus, *folder, "--recompute_experts", "true", "--resume_from_checkpoint")  # keeps results
    for name, value in (("window_length", "5"), ("lr_scheduler_kwargs", '{"min_lr_rate": 0.3}')):
        values = [*folder, f"--{name}", value, "--resume_from_checkpoint"]
        assert_one_line_error(capfd, corpus, values, f"{name}=.* differs from {name}=")
