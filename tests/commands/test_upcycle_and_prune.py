"""`moe-hf upcycle` and `moe-hf prune`: from folder to folder, for both families."""

import pytest
import torch
from tiny_models import tiny_gnmt, tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from moe_hf import cli
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.evaluation.translation_model import evaluate_translation

LINES = [f"the {color} {animal} saw a bird" for color in ("red", "blue", "green") for animal in ("cat", "dog")] * 4
FAMILIES = {"lstm_moe": AutoModelForCausalLM, "gnmt_moe": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a model with one expert and of a model with six, by model type, and text for both."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    tokenizers = {
        "lstm_moe": train_tokenizer(LINES, kind="word", vocab_size=30),
        "gnmt_moe": train_translation_tokenizer(LINES, vocab_size=280),
    }
    for family, make_model in (("lstm_moe", tiny_lm), ("gnmt_moe", tiny_gnmt)):
        tokenizer = tokenizers[family]
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        if family == "gnmt_moe":
            ids |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
        for n in (1, 6):
            sizes = {"num_experts": n, "num_experts_per_tok": min(n, 2), "vocab_size": len(tokenizer)}
            model = make_model(torch.float32, **sizes, **ids)
            model.generation_config.max_new_tokens = 6
            model.save_pretrained(folder / f"{family}-{n}")
            tokenizer.save_pretrained(folder / f"{family}-{n}")
    return folder


@pytest.fixture
def call(capsys):
    """Calls `moe-hf`; returns exit status, output and errors."""

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def generate(folder, family):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = FAMILIES[family].from_pretrained(folder)
    batch = tokenizer(LINES[:3], return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return tokenizer.batch_decode(model.generate(**batch)), model


@pytest.mark.parametrize("family", FAMILIES)
def test_upcycled_folder_writes_the_same_text(family, sources, call, tmp_path):
    source, out = sources / f"{family}-1", tmp_path / "out"
    status, output, error = call("upcycle", source, out, "--num_experts", 8, "--slices", 4)
    assert status == 0, error
    assert "the source's function = exact in evaluation\n" in output
    written, model = generate(out, family)
    assert written == generate(source, family)[0]
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (8, 2)
    assert model.generation_config.max_new_tokens == 6
    assert "local" not in (out / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("method", ["prune", "merge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_folder_has_the_perplexity_that_is_reported(family, method, sources, call, tmp_path):
    source, out, text = sources / f"{family}-6", tmp_path / "out", str(sources / "text.txt")
    texts = [text] if family == "lstm_moe" else [text, text]
    status, output, error = call("prune", source, *texts, out, "--keep", 3, "--method", method)
    assert status == 0, error
    (line,) = [line for line in output.splitlines() if line.startswith("perplexity_per_word = ")]
    before, after = (float(value) for value in line.partition(" = ")[2].split(" -> "))
    for folder, reported in ((source, before), (out, after)):
        if family == "lstm_moe":
            metrics = evaluate_lm(str(folder), texts)
        else:
            metrics = evaluate_translation(str(folder), *texts, num_beams=1)[0]
        assert metrics["eval_perplexity_per_word"] == pytest.approx(reported, rel=1e-4)
    assert generate(out, family)[1].config.num_experts == 3


def test_bad_input_is_one_line_and_nothing_is_written(sources, call, tmp_path):
    text = sources / "text.txt"
    one, six, translator = (sources / name for name in ("lstm_moe-1", "lstm_moe-6", "gnmt_moe-6"))
    for arguments, named in (
        (["upcycle", one, tmp_path / "out", "--num_experts", 6, "--slices", 4], "num_experts=6 must be a multiple"),
        (["upcycle", one, sources, "--num_experts", 6], "must be new or empty"),
        (["upcycle", tmp_path / "nowhere", tmp_path / "out", "--num_experts", 6], "nowhere: cannot be loaded"),
        (["prune", six, text, tmp_path / "out", "--keep", 1], "keep=1 is below num_experts_per_tok=2"),
        (["prune", six, text, text, sources, "--keep", 3], "must be new or empty"),
        (["prune", six, tmp_path / "no.txt", tmp_path / "out", "--keep", 3], "no file matches"),
        (["prune", translator, text, tmp_path / "out", "--keep", 3], "must be two files for a translation model"),
    ):
        status, output, error = call(*arguments)
        assert (status, output) == (1, "") and named in error, (arguments, error)
        assert error.splitlines()[-1].startswith("error: ")  # after the progress of loading the model
    assert not (tmp_path / "out").exists()
