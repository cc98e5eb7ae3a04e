"""Training from Python with keywords, and the exports of `moe_hf`."""

import pytest

import moe_hf
from moe_hf.errors import InputError

TINY = dict(hidden_size=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, vocab_size=300, max_steps=2)
TINY |= dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g\n" * 40, encoding="utf-8")
    return path


def test_a_language_model_is_trained_by_keywords(text, tmp_path):
    arguments = dict(train_files=text, validation_files=[str(text)], output_dir=tmp_path / "lm", window_length=8)
    trainer, metrics = moe_hf.train_lm(**arguments, cache_dir=str(tmp_path / "cache"), **TINY)
    assert trainer.state.global_step == 2 and trainer.model.config.num_experts == 4
    assert metrics["eval_loss"] > 0 and (tmp_path / "lm" / "model.safetensors").is_file()


def test_a_translator_is_trained_by_a_file_and_keywords_which_win(text, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_experts: 2\nnum_experts_per_tok: 1\nhidden_size: 8\n", encoding="utf-8")
    trainer, metrics = moe_hf.train_translation(
        config,
        train_source_files=text,
        train_target_files=text,
        output_dir=tmp_path / "translator",
        encoder_layer_pattern=["lstm", "moe"],
        decoder_layer_pattern=["lstm", "lstm"],
        cache_dir=str(tmp_path / "cache"),
        **TINY,
    )
    assert trainer.model.config.num_experts == 4 and trainer.model.config.encoder_layer_pattern == ["lstm", "moe"]
    assert metrics == {}


@pytest.mark.parametrize(
    ("train", "keywords", "message"),
    [
        (moe_hf.train_lm, {"num_expert": 4}, "no argument is named 'num_expert', did you mean 'num_experts'"),
        (moe_hf.train_translation, {"window_length": 4}, "no argument is named 'window_length'"),
        (moe_hf.train_lm, {"config": "nowhere.yaml"}, "configuration file nowhere.yaml does not exist"),
    ],
)
def test_a_wrong_keyword_is_refused_by_name(train, keywords, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(output_dir=tmp_path / "run", **keywords)


def test_every_export_is_there_and_named():
    for name in moe_hf.__all__:
        assert getattr(moe_hf, name) is not None and name in dir(moe_hf)
    with pytest.raises(AttributeError, match="module 'moe_hf' has no attribute 'train'"):
        _ = moe_hf.train
