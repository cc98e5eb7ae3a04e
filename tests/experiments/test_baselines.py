"""A Transformer baseline beside our translation models: the same loss, batches and table."""

import json
import math
import re
from functools import partial

import pytest
import torch
from tiny_runs import write_translation_config
from transformers import AutoConfig, AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from moe_hf.data.translation_tokenizers import encode_texts, load_translation_tokenizer
from moe_hf.evaluation.translation_model import evaluate_translation
from moe_hf.model_size import size_of_baseline
from moe_hf.training.translation_trainer import token_loss
from moe_hf.translator import Translator

MARIAN = {"model_type": "marian", "d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 12}
MARIAN |= {"decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.1}
MARIAN |= {"max_position_embeddings": 128, "label_smoothing": 0.2}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    texts = {"en": ["a dog sees a cat", "a cat"], "de": ["ein Hund sieht einen Kater", "ein Kater"]}
    pairs = [{"source_files": [str(folder / "text.en")], "target_files": [str(folder / "text.de")]}]
    baselines = {"Transformer": MARIAN | {"max_steps": 6}}
    return write_translation_config(folder, texts, train_pairs=pairs, validation_pairs=pairs, baselines=baselines)


@pytest.fixture
def call(call_script):
    return partial(call_script, "compare_translation.py")


def test_from_configuration_to_table(config, call):
    status, output, _ = call(config)
    folder = config.parent / "run" / "Transformer-seed1"
    assert status == 0 and "| Transformer | 0.00 M |" in output
    assert json.loads((folder / "trainer_state.json").read_text())["max_steps"] == 6
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(model) is MarianMTModel and model.config.label_smoothing == 0.2
    found = evaluate_translation(str(folder), *(str(config.parent / f"text.{name}") for name in ("en", "de")))[0]
    trained = json.loads((folder / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    assert "Transformer-seed1: finished before" in call(config)[1]


def test_perplexity_is_that_of_every_token(config, call):
    assert call(config)[0] == 0
    folder = config.parent / "run" / "Transformer-seed1"
    found = evaluate_translation(str(folder), *(str(config.parent / f"text.{name}") for name in ("en", "de")))[0]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    tokenizer, nll, num_tokens = load_translation_tokenizer(str(folder)), 0.0, 0
    lines = [(config.parent / f"text.{name}").read_text(encoding="utf-8").splitlines() for name in ("en", "de")]
    for source, target in zip(*lines):
        (source,), (target,) = encode_texts(tokenizer, [source]), encode_texts(tokenizer, [target])
        given = torch.tensor([[tokenizer.bos_token_id, *target[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=given).logits[0]
        nll -= logits.log_softmax(-1)[range(len(target)), target].sum().item()
        num_tokens += len(target)
    assert found["eval_loss"] == pytest.approx(nll / num_tokens, rel=1e-5)


def test_a_variant_has_another_name(config, call, tmp_path):
    status, _, error = call(config, "--variants", '{"Transformer": {}}', "--output_dir", tmp_path / "run")
    assert status == 1 and "baselines: 'Transformer' is the name of a variant too" in error


def test_gnmts_search_and_the_attention_of_a_baseline(config, call):
    assert call(config)[0] == 0
    folder = str(config.parent / "run" / "Transformer-seed1")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), load_translation_tokenizer(folder)
    translator = Translator(model, tokenizer, num_beams=3, length_alpha=0.6, coverage_beta=0.2)
    ((translation,),) = translator.translate(["a dog sees a cat"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    attention = Translator(model, tokenizer).attention(translation)
    assert attention.shape == (len(translation.target_ids), len(translation.source_ids))
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(len(attention)))


def test_translations_end_where_the_positions_do(config, call):
    assert call(config)[0] == 0
    folder = str(config.parent / "run" / "Transformer-seed1")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), load_translation_tokenizer(folder)
    source = "a dog sees a cat " * 9
    assert 40 < len(encode_texts(tokenizer, [source])[0]) <= 128
    never_ends = {"suppress_tokens": [tokenizer.eos_token_id], "forced_eos_token_id": None}
    ((translation,),) = Translator(model, tokenizer, **never_ends).translate([source])
    assert len(translation.target_ids) == 128


def test_its_checkpoints_are_averaged_with_their_ties(config, call, call_command, tmp_path):
    run = tmp_path / "run" / "Transformer-seed1"
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", tmp_path / "run"]
    assert call(config, *saving)[0] == 0
    assert call_command("average", run, tmp_path / "mean", "--last", 3)[0] == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mean")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    parts = [AutoModelForSeq2SeqLM.from_pretrained(run / f"checkpoint-{step}").state_dict() for step in (4, 5, 6)]
    for name, found in model.state_dict().items():
        expected = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("smoothing", [None, 0.3])
def test_the_loss_is_a_sum_with_label_smoothing_while_training(smoothing):
    torch.manual_seed(0)
    note = {} if smoothing is None else {"label_smoothing": smoothing}
    own = {name: value for name, value in MARIAN.items() if name not in ("model_type", "label_smoothing")}
    model = MarianMTModel(MarianConfig(vocab_size=9, pad_token_id=0, **(own | note)))
    outputs = type("Outputs", (), {"logits": torch.randn(2, 3, 9)})
    labels = torch.tensor([[1, 4, -100], [8, 0, 2]])
    for training in (True, False):
        expected = 0.0
        for row in range(2):
            for place in range(3):
                if labels[row, place] < 0:
                    continue
                log_probs = [math.log(p) for p in outputs.logits[row, place].double().softmax(-1).tolist()]
                share = smoothing if training and smoothing else 0.0
                expected -= (1 - share) * log_probs[labels[row, place]] + share * sum(log_probs) / 9
        found = token_loss(model.train(training))(outputs, labels, num_items_in_batch=7)
        assert found.item() == pytest.approx(expected / 7, rel=1e-5)


def test_a_baseline_is_counted_as_ours_are():
    parameters, ops = size_of_baseline(AutoConfig.for_model(**MARIAN, vocab_size=50, pad_token_id=0))
    d, attention = 8, 4 * 8 * 8
    matrices = 2 * (attention + 2 * d * 12) + (2 * attention + 2 * d * 20)
    assert ops == matrices
    biases_and_norms = 2 * (4 * d + 12 + d + 2 * 2 * d) + (2 * 4 * d + 20 + d + 3 * 2 * d)
    assert parameters == matrices + biases_and_norms


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "marien"}, "baseline=.*marien.* is not a model"),
        ({"model_type": "gpt2"}, "'gpt2'.* is not a model: 'd_model' is not an argument of gpt2"),
        ({"dropuot": 0.9}, "is not a model: 'dropuot' is not an argument of marian"),
        ({"encoder_attention_heads": 3}, "cannot be made: embed_dim must be divisible by num_heads"),
        ({"attn_implementation": "flash"}, "cannot be made: .*flash"),
        ({"model_type": "m2m_100"}, "cannot be trained here: it does not shift labels"),
        ({"label_smoothing": "0.2"}, "label_smoothing='0.2' must be a number of at least 0 and below 1"),
        ({"vocab_size": 7}, "'Transformer': 'vocab_size' is not an argument of the model"),
        ({"train_pairs": "/nowhere"}, "'Transformer': 'train_pairs' is not an argument of the model"),
        ({"max_position_embeddings": 4}, "max_position_embeddings=4, but a source sentence has"),
        ({"weight_decay": 0.1}, "'Transformer': 'weight_decay' is not an argument of the model"),
        ({"max_steps": "many"}, "'Transformer': max_steps='many' must be of type int"),
    ],
)
def test_a_wrong_baseline_is_named(config, call, changes, named, tmp_path):
    baselines = json.dumps({"Transformer": MARIAN | changes})
    status, _, error = call(config, "--baselines", baselines, "--output_dir", tmp_path / "run")
    assert status == 1 and re.search(named, error), error
