"""Training a translation model in this process: learning, resumption, evaluation, scripts, and bad input."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from tiny_models import aligned
from tiny_runs import TRANSLATION_CONFIG
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from moe_hf import cli
from moe_hf.averaging import average_checkpoints, last_checkpoints
from moe_hf.commands import train_translation as train_translation_command
from moe_hf.commands import translate
from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.errors import InputError
from moe_hf.evaluation import translation_model
from moe_hf.evaluation.translation_model import evaluate_translation
from moe_hf.hub import export
from moe_hf.training.arguments import TranslationModelArguments, TranslationTrainingArguments, parse_arguments
from moe_hf.training.translation import load_pairs, train_translation
from moe_hf.training.translation_trainer import TranslationTrainer
from moe_hf.translator import Translator, on_one_line
from tests.training.test_resume import assert_same_run

CLASSES = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)
WORDS = {"a": "ein", "dog": "Hund", "cat": "Kater", "sees": "sieht", "big": "großer", "old": "alter"}
PAIRS = [
    f"a {adjective} {noun} sees a {other}"
    for adjective in ("big", "old")
    for noun in ("dog", "cat")
    for other in ("cat", "dog")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    targets = [" ".join(WORDS[word] for word in line.split()) for line in PAIRS]
    (folder / "train.en").write_text("\n".join(PAIRS * 3 + [""]) + "\n", encoding="utf-8")
    (folder / "train.de").write_text("\n".join(targets * 3 + ["leer"]) + "\n", encoding="utf-8")
    (folder / "valid.en").write_text("\n".join(PAIRS[:5]) + "\n", encoding="utf-8")
    (folder / "valid.de").write_text("\n".join(targets[:5]) + "\n", encoding="utf-8")
    paths = {
        f"{part}_{side}_files": [f"{folder}/{part[:5]}.{language}"]
        for part in ("train", "validation")
        for side, language in (("source", "en"), ("target", "de"))
    }
    paths |= {"cache_dir": f"{folder}/cache", "output_dir": f"{folder}/run"}
    (folder / "config.yaml").write_text(
        TRANSLATION_CONFIG + json.dumps(paths)[1:-1].replace(', "', '\n"'), encoding="utf-8"
    )
    return folder


def train(corpus, *overrides):
    return train_translation(*parse_arguments([str(corpus / "config.yaml"), *map(str, overrides)], CLASSES))


@pytest.fixture(scope="module")
def trained(corpus):
    return train(corpus)


def test_run_leaves_a_model_that_loads_and_translates_as_it_did(corpus, trained):
    trainer, metrics = trained
    model = AutoModelForSeq2SeqLM.from_pretrained(corpus / "run")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run")
    inputs = tokenizer(PAIRS[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs, decoder_input_ids=inputs["input_ids"]).logits
        assert torch.equal(aligned(model)(**inputs, decoder_input_ids=inputs["input_ids"]).logits, expected)
    assert metrics["eval_bleu_signature"].startswith("nrefs:1|case:mixed")
    assert json.loads((corpus / "run" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    assert (corpus / "run" / "expert_history.csv").read_text().count("\n") == 1 + 2 * 2


def test_evaluation_of_the_saved_model_gives_the_same_numbers(corpus, trained):
    metrics, translations = evaluate_translation(
        str(corpus / "run"), str(corpus / "valid.en"), str(corpus / "valid.de"), num_beams=1
    )
    for name, value in trained[1].items():
        if "runtime" not in name and name != "epoch":
            assert metrics[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name
    assert translations == trained[0].translations and len(translations) == 5


def test_evaluation_from_python_and_by_command_both_use_4_beams(corpus, trained, monkeypatch):
    used = []

    class Recorded(Translator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            used.append(self.num_beams)

    monkeypatch.setattr(translation_model, "Translator", Recorded)
    files = [str(corpus / name) for name in ("run", "valid.en", "valid.de")]
    from_python = evaluate_translation(*files)[1]
    assert cli.main(["evaluate-translation", *files, "--output", str(corpus / "by-command")]) == 0
    assert used == [4, 4]
    by_command = (corpus / "by-command").read_bytes().decode()
    assert by_command == "".join(f"{on_one_line(text)}\n" for text in from_python)


def test_the_longest_pair_is_told(corpus, caplog):
    caplog.set_level("INFO", logger="moe_hf")
    train(corpus, "--output_dir", corpus / "longest", "--max_steps", "1", "--tokens_per_batch", "10")
    printed = caplog.text
    tokenizer = AutoTokenizer.from_pretrained(corpus / "longest")
    sides = [PAIRS, (corpus / "train.de").read_text(encoding="utf-8").splitlines()[:-1]]
    longest = max(len(tokenizer(line)["input_ids"]) for lines in sides for line in lines)
    assert longest > 10 and f"of at most {longest} tokens a side; the longest pair has {longest}\n" in printed


def test_the_folder_has_an_output_length_and_every_later_folder_keeps_it(corpus, trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run")
    targets = (corpus / "train.de").read_text(encoding="utf-8").splitlines()
    length = 2 * max(len(ids) for ids in tokenizer(targets)["input_ids"]) + 10
    saving = ["--output_dir", tmp_path / "tuned", "--model_name_or_path", corpus / "run"]
    saving += ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4]
    train(corpus, *saving, "--max_target_length", 17)  # shorter targets, from the same model
    average_checkpoints(last_checkpoints(str(tmp_path / "tuned"), 2)).save_pretrained(tmp_path / "mean")
    export(str(corpus / "run"), tmp_path / "export")
    for folder in (corpus / "run", *(tmp_path / name for name in ("tuned", "mean", "export"))):
        config = GenerationConfig.from_pretrained(folder)
        assert (config.max_length, config.num_beams) == (length, None)
    model = AutoModelForSeq2SeqLM.from_pretrained(corpus / "run")
    model.generation_config.eos_token_id = None
    assert model.generate(**tokenizer(PAIRS[0], return_tensors="pt")).shape[1] == length


def test_predictions_of_the_official_recipe_can_be_decoded(corpus, trained, tmp_path):
    """Runs the last steps: `predict` with batches of different length, and `batch_decode` of the predictions."""
    tokenizer = AutoTokenizer.from_pretrained(corpus / "run")
    model = AutoModelForSeq2SeqLM.from_pretrained(corpus / "run")
    arguments = Seq2SeqTrainingArguments(
        tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=1, predict_with_generate=True
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(model, arguments, data_collator=collator, processing_class=tokenizer)
    rows = [dict(tokenizer(line, text_target=target)) for line, target in zip(PAIRS, PAIRS[1:])]
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (7, model.generation_config.max_length) and predictions.min() >= 0
    expected = [model.generate(**tokenizer(line, return_tensors="pt"))[0] for line in PAIRS[:7]]
    texts = tokenizer.batch_decode(predictions, skip_special_tokens=True)
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_evaluations_leave_nothing_behind(trained):
    trainer = trained[0]
    before = list(trainer.accelerator._dataloaders)
    trainer.evaluate()
    assert trainer.accelerator._dataloaders == before


@pytest.mark.parametrize(
    ("words", "processes", "named"),
    [
        (8000, 6, "validation pairs: 5 sentence pairs cannot be spread over 6 processes"),
        (1, 3, "validation pairs: 5 batches of one .* over 3 processes: eval_tokens_per_batch=1 is too small"),
    ],
)
def test_validation_pairs_that_the_processes_cannot_share_are_refused_before_the_training(
    corpus, monkeypatch, words, processes, named
):
    arguments = parse_arguments([str(corpus / "config.yaml"), "--eval_tokens_per_batch", str(words)], CLASSES)
    monkeypatch.setattr(TranslationTrainingArguments, "world_size", processes)
    monkeypatch.setattr("moe_hf.training.translation.local_rank_zero_first", lambda args: nullcontext())
    monkeypatch.setattr("moe_hf.training.translation.broadcast_from_rank_zero", lambda make, args: make())
    with pytest.raises(InputError, match=named):
        load_pairs(*arguments, checkpoint=None)


def test_perplexity_is_that_of_the_references(corpus, trained):
    trainer, metrics = trained
    model, tokenizer, total, tokens = trainer.model.eval(), trainer.processing_class, 0.0, 0
    targets = (corpus / "valid.de").read_text(encoding="utf-8").splitlines()
    for source, target in zip(PAIRS, targets):
        labels = tokenizer(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += model(**tokenizer(source, return_tensors="pt"), labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_it_learns_to_translate(corpus):
    overrides = ["--output_dir", corpus / "learnt", "--max_steps", 300, "--hidden_size", 32, "--dropout", 0.0]
    overrides += ["--tokens_per_batch", 200, "--moe_intermediate_size", 32, "--label_smoothing", 0.0]
    _, metrics = train(corpus, *overrides)
    assert metrics["eval_bleu"] > 90


def test_data_seed_orders_the_batches_and_nothing_else(corpus):
    losses = {}
    for data_seed in (None, 42, 7):  # 42 is the seed itself
        overrides = [] if data_seed is None else ["--data_seed", data_seed]
        trainer, _ = train(corpus, "--output_dir", corpus / f"order-{data_seed}", "--logging_steps", 1, *overrides)
        losses[data_seed] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[None] == losses[42] != losses[7]


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_killed_run_goes_on_as_if_nothing_had_been(corpus, monkeypatch):
    arguments = ["--max_steps", 8, "--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1]
    arguments += ["--gradient_accumulation_steps", 2]
    whole, killed = corpus / "whole", corpus / "killed"
    train(corpus, "--output_dir", whole, *arguments)
    with monkeypatch.context() as patch:
        make = TranslationTrainer.__init__
        patch.setattr(TranslationTrainer, "__init__", lambda self, *a, **k: make(self, *a, callbacks=[Kill()], **k))
        with pytest.raises(KeyboardInterrupt):
            train(corpus, "--output_dir", killed, *arguments)
    assert not (killed / "model.safetensors").exists()
    train(corpus, "--output_dir", killed, "--resume_from_checkpoint", "last", *arguments)
    assert_same_run(killed, whole, 8)


def test_multilingual_run_reports_each_direction(corpus):
    files = {"en": str(corpus / "valid.en"), "de": str(corpus / "valid.de")}
    overrides = ["--train_pairs", json.dumps([{"parallel_files": files}]), "--output_dir", corpus / "multilingual"]
    overrides += ["--validation_pairs", json.dumps([{"parallel_files": files}]), "--sampling_temperature", 5]
    text = re.sub(r'"(train|validation)_\w+_files": .*\n', "", (corpus / "config.yaml").read_text())
    (corpus / "multilingual.yaml").write_text(text)
    arguments = parse_arguments([str(corpus / "multilingual.yaml"), *map(str, overrides)], CLASSES)
    trainer, metrics = train_translation(*arguments)
    assert {"eval_bleu_en-de", "eval_bleu_de-en", "eval_chrf_en-de"} <= metrics.keys()
    assert metrics["eval_bleu"] == pytest.approx((metrics["eval_bleu_en-de"] + metrics["eval_bleu_de-en"]) / 2)
    assert len(trainer.translations) == 10


def test_the_callers_arguments_stay_as_they_were(corpus):
    options = ["--output_dir", str(corpus / "unchanged"), "--max_steps", "1"]
    arguments = parse_arguments([str(corpus / "config.yaml"), *options], CLASSES)
    before = arguments[2].to_dict()
    trainer, _ = train_translation(*arguments)
    assert arguments[2].to_dict() == before and before["remove_unused_columns"]
    assert not trainer.args.remove_unused_columns


def test_translate_prints_as_many_lines_as_it_reads(corpus, trained, capsys):
    (corpus / "input.txt").write_text("a dog\n\na cat sees a dog\n", encoding="utf-8")
    arguments = [str(corpus / "run"), str(corpus / "input.txt")]
    assert translate.main([*arguments, "--attention_plot", str(corpus / "attention.png")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4 and lines[1] == "" and (corpus / "attention.png").is_file()
    assert translate.main([*arguments, "--num_return_sequences", "2", "--scores"]) == 0
    assert all(re.match(r"-?\d+\.\d{4}\t", line) for line in capsys.readouterr().out.splitlines())
    assert translate.main([str(corpus / "run"), str(corpus / "nothing.txt")]) == 1
    assert re.match(r"error: .*nothing\.txt.*\n\Z", capsys.readouterr().err)
    (corpus / "latin.txt").write_bytes(b"fine\nd\xe9j\xe0\n")
    assert translate.main([str(corpus / "run"), str(corpus / "latin.txt")]) == 1
    assert "latin.txt: line 2 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--train_target_files", "{valid}"], r"train\.en has 25 lines and .*valid\.de has 5"),
        (["--num_experts", "1"], "num_experts_per_tok=2 exceeds num_experts=1"),
        (["--attention_type", "dot"], "attention_type='dot' is not known, use one of product, additive"),
        (["--decoder_layer_pattern", "moe", "lstm"], "decoder_layer_pattern=.* must start with 'lstm'"),
        (["--constant_steps", "-1"], "constant_steps=-1 must be at least 0"),
        (["--constant_steps", "5", "--lr_scheduler_type", "cosine"], "needs lr_scheduler_type=inverse_sqrt"),
        (["--eval_num_beams", "0"], "eval_num_beams=0 must be at least 1"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1 .* only 0 is allowed"),
        (["--max_source_length", "1"], "max_source_length=1"),
        (["--tokens_per_batch", "0"], "error: tokens_per_batch=0 must be at least 1"),
        (
            ["--model_name_or_path", "{run}-not", "--tokenizer_name_or_path", "{run}"],
            "model_name_or_path=.*run-not: cannot",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(corpus, trained, capsys, overrides, named):
    places = {"valid": corpus / "valid.de", "run": corpus / "run"}
    arguments = [str(corpus / "config.yaml"), "--output_dir", str(corpus / "refused")]
    arguments += [text.format(**places) for text in overrides]
    assert train_translation_command.main(arguments) == 1
    error = capsys.readouterr().err
    assert re.search(named, error) and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (corpus / "refused").exists() or not any((corpus / "refused").iterdir())
