"""`moe-hf translate` and `moe-hf evaluate-translation`: one line of output per line of input, and bad input."""

import pytest
import torch
from pictures import is_drawn
from tiny_models import tiny_gnmt

import moe_hf
from moe_hf.commands import evaluate_translation, translate
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.translator import Translator, on_one_line

LINES = ["a dog", "the black cat sees two dogs", "", "two birds"]


def saved(folder, tokenizer, model):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return train_translation_tokenizer(LINES, vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """The folder of a model whose translations have line breaks."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_gnmt(torch.float32, vocab_size=len(tokenizer), gating="softmax_top_k", std=0.5)
    first = [found[0].target_ids[0] for found in Translator(model, tokenizer).translate([LINES[0], LINES[1]])]
    weight = model.lm_head.weight.data
    for often, byte in zip(first, ("Ċ", "č")):  # \n and \r
        rows = [often, tokenizer.convert_tokens_to_ids(byte)]
        weight[rows] = weight[rows[::-1]].clone()
    texts = [found[0].text for found in Translator(model, tokenizer).translate(LINES)]
    assert any("\n" in text for text in texts)
    return saved(folder, tokenizer, model)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call a command with arguments, in a folder that has the lines: its exit status, its output, its errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in LINES))
    (tmp_path / "targets.txt").write_text("x\ny\nz\n\n")

    def run(command, *arguments):
        status = command.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_every_line_gives_one_line_though_translations_have_breaks(call, model):
    status, output, _ = call(translate, model, "lines.txt", "--num_beams", 1)
    lines = output.split("\n")
    assert status == 0 and len(lines) == 5 and lines[4] == "" and "\r" not in output
    assert lines[2] == "" and all(lines[row] for row in (0, 1, 3))


def test_a_break_is_a_space():
    assert on_one_line("a\nb\r\nc\rd\u2028e\x0c") == "a b c d\u2028e\x0c"


def test_evaluation_writes_a_line_for_each_line_of_the_source(call, model, tmp_path):
    arguments = [model, "lines.txt", "targets.txt", "--num_beams", 1, "--output"]
    assert call(evaluate_translation, *arguments, "out.txt")[0] == 0
    lines = (tmp_path / "out.txt").read_bytes().decode().split("\n")
    assert len(lines) == 5 and lines[2] == lines[3] == lines[4] == "" and lines[0] and lines[1]
    assert lines[:2] == call(translate, model, "lines.txt", "--num_beams", 1)[1].split("\n")[:2]


def test_evaluation_judges_one_translation_of_each_line(call, tokenizer, tmp_path):
    several = tiny_gnmt(torch.float32, vocab_size=len(tokenizer), gating="softmax_top_k", std=0.5)
    several.generation_config.num_beams = several.generation_config.num_return_sequences = 3
    arguments = [saved(tmp_path / "several", tokenizer, several), "lines.txt", "targets.txt", "--num_beams", 1]
    assert call(evaluate_translation, *arguments)[0] == 0


def test_the_first_line_with_a_translation_is_plotted(call, model, tmp_path):
    (tmp_path / "first.txt").write_text("\na dog\n")
    assert call(translate, model, "first.txt", "--attention_plot", "plot.png")[0] == 0
    assert is_drawn(tmp_path / "plot.png")
    (tmp_path / "none.txt").write_text("\n\n")
    status, output, error = call(translate, model, "none.txt", "--attention_plot", "other.png")
    assert (status, output) == (0, "\n\n") and "attention_plot=other.png was not written" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num_beams", 0], "num_beams=0 must be at least 1"),
        (["--length_alpha", "nan"], "length_alpha=nan must be at least 0"),
        (["--length_alpha", 0.2, "--length_penalty", 2], "length_penalty=2.0 is not for GNMT's score"),
        (["--attention_plot", "nowhere/plot.png"], "attention_plot=nowhere/plot.png: there is no folder nowhere"),
        (["--attention_plot", "plot.exe"], "attention_plot=plot.exe"),
        (["--device", "cheese"], "device='cheese'"),
        (["--target_language", "xx"], "target_language='xx' is unknown"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_printed(call, model, arguments, named):
    status, output, error = call(translate, model, "lines.txt", *arguments)
    error = error.splitlines()[-1]  # after the library's progress bars
    assert (status, output) == (1, "") and error.startswith("error: ") and named in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target_language", "xx"], "target_language='xx' is unknown to the tokenizer, which has no language tags"),
        (["--num_beams", 0], "num_beams=0 must be at least 1"),
        (["--output", "nowhere/out.txt"], "output=nowhere/out.txt: there is no folder nowhere"),
    ],
)
def test_evaluation_refuses_before_it_translates(call, model, arguments, named):
    status, _, error = call(evaluate_translation, model, "lines.txt", "targets.txt", *arguments)
    error = error.splitlines()[-1]
    assert status == 1 and error.startswith("error: ") and named in error


def test_pipeline_knows_devices_and_needs_a_tokenizer(tokenizer):
    model = tiny_gnmt(vocab_size=len(tokenizer), gating="softmax_top_k", std=0.5)
    with pytest.raises(ValueError, match="tokenizer=None: .* give its tokenizer"):
        moe_hf.pipeline("translation", model=model)
    translate_text = moe_hf.pipeline("translation", model=model, tokenizer=tokenizer, device="cpu")
    assert translate_text("a dog")[0]["translation_text"] and translate_text.model.device.type == "cpu"
    assert moe_hf.pipeline("translation", model=model, tokenizer=tokenizer, device=-1).model.device.type == "cpu"
    with pytest.raises(ValueError, match="device='meat'"):
        moe_hf.pipeline("translation", model=model, tokenizer=tokenizer, device="meat")
    moved = moe_hf.pipeline("translation", model=model, tokenizer=tokenizer, device="meta")
    assert moved.model.device.type == "meta"


def test_half_a_character_is_named(tokenizer):
    model = tiny_gnmt(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="text 2 of 2 .*surrogate"):
        list(Translator(model, tokenizer).translate(["fine", "\ud83d"]))
