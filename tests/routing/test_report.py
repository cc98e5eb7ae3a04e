"""The routing report: the tokens it reads, the contents of the page, the command and its errors."""

import gzip
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
from pictures import is_drawn
from tiny_reports import (
    NASTY,
    SOURCES,
    TARGETS,
    contexts_of,
    read_page,
    save_gnmt,
    save_lm,
    unpack,
    without_pictures,
    write_history,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig

from moe_hf.data.sentence_pairs import PairSource, load_sentence_pairs
from moe_hf.data.tokenized_pairs import tokenize_pairs
from moe_hf.errors import InputError
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.hub import export
from moe_hf.routing.coactivation import PairCounts
from moe_hf.routing.history_plot import plot_expert_history, read_expert_history
from moe_hf.routing.observe import routing_totals
from moe_hf.routing.page_data import coactivation_data
from moe_hf.routing.report import routing_report
from moe_hf.routing.statistics import collect_routing
from moe_hf.routing.texts import PairText, StreamText
from moe_hf.routing.token_texts import token_texts, whole_characters

ROOT = Path(__file__).parents[2]
HIERARCHY = {"num_experts": 12, "num_experts_per_tok": 4, "num_expert_groups": 4}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("lm"), **HIERARCHY)


@pytest.fixture(scope="module")
def gnmt(tmp_path_factory):
    return save_gnmt(tmp_path_factory.mktemp("gnmt"))


def encoded_pairs(folder):
    source = PairSource(source_files=[str(folder / "text.en")], target_files=[str(folder / "text.de")])
    return tokenize_pairs(load_sentence_pairs([source]), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("carry_state", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 5, 52, 1000])
def test_a_stream_is_read_once_in_rows_that_begin_where_the_state_is_zero(carry_state, max_tokens, lm):
    stream = np.random.default_rng(0).integers(0, 20, 101)
    text = StreamText(stream, window_length=7, batch_size=4, max_tokens=max_tokens, carry_state=carry_state)
    (side,) = text.sides.values()
    length = min(max_tokens, 100)
    assert side.ids.tolist() == stream[:length].tolist() and side.following.tolist() == stream[1 : length + 1].tolist()
    read, caches, begun = [], set(), []
    for inputs, positions in text.batches(AutoModelForCausalLM.from_pretrained(lm).config):
        real = positions[""] >= 0
        assert (inputs["attention_mask"] == real).all()
        assert inputs["input_ids"][real].tolist() == stream[positions[""][real].numpy()].tolist()
        begun += [row[0].item() for row in positions[""] if row[0] >= 0 and (not carry_state or not caches)]
        read += positions[""][real].tolist()
        caches.add(id(inputs["past_key_values"]))
    assert sorted(read) == list(range(length)) and len(caches) == 1
    assert sorted(begun) == side.starts.tolist()


def test_pairs_are_read_as_in_training_until_one_side_would_have_too_many_tokens(gnmt):
    tokens = encoded_pairs(gnmt)
    rows = [tokens[i] for i in range(4)]
    limit = sum(max(len(row["input_ids"]), len(row["labels"])) for row in rows)
    config = AutoModelForSeq2SeqLM.from_pretrained(gnmt).config
    text = PairText(tokens, config.decoder_start_token_id, batch_size=3, max_tokens=limit)
    assert text.sides["encoder"].ids.tolist() == [i for row in rows for i in row["input_ids"]]
    assert text.sides["decoder"].ids.tolist() == [i for row in rows for i in [1, *row["labels"][:-1]]]
    assert text.sides["decoder"].following.tolist() == [i for row in rows for i in row["labels"]]
    assert text.sides["encoder"].following.tolist() == [i for row in rows for i in [*row["input_ids"][1:], -1]]
    read = {"encoder": [], "decoder": []}
    for inputs, positions in text.batches(config):
        for side, ids, mask in (("encoder", "input_ids", "attention_mask"),) + (
            ("decoder", "decoder_input_ids", "decoder_attention_mask"),
        ):
            real = positions[side] >= 0
            assert (inputs[mask] == real).all()
            assert inputs[ids][real].tolist() == text.sides[side].ids[positions[side][real].numpy()].tolist()
            read[side] += positions[side][real].tolist()
    assert {side: sorted(places) for side, places in read.items()} == {
        side: list(range(len(found.ids))) for side, found in text.sides.items()
    }
    with pytest.raises(InputError, match="max_tokens=2 is too small, the first pair has"):
        PairText(tokens, 1, batch_size=3, max_tokens=2)


def test_balance_is_that_of_evaluate_lm(lm, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    metrics = evaluate_lm(str(lm), [str(lm / "text.txt")], window_length=9, batch_size=3)
    routing_report(str(lm), [str(lm / "text.txt")], tmp_path / "a.html", window_length=9, batch_size=3)
    (layer,) = read_page(tmp_path / "a.html")["layers"]
    for name in ("cv_importance", "cv_load", "max_over_mean_load", "dead_experts"):
        assert layer["summary"][name] == pytest.approx(metrics[f"layers.1/{name}"], rel=1e-5)


def test_batches_of_pairs_change_nothing_and_both_sides_are_those_of_the_whole_model(gnmt):
    tokens, model = encoded_pairs(gnmt), AutoModelForSeq2SeqLM.from_pretrained(gnmt)
    found = []
    for batch_size in (1, 4):
        text = PairText(tokens, 1, batch_size, max_tokens=10_000)
        lengths = {side: len(part.ids) for side, part in text.sides.items()}
        found.append(collect_routing(model, text.batches(model.config), lengths))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name].experts, found[1][name].experts)
        np.testing.assert_allclose(found[0][name].gates, found[1][name].gates, atol=1e-5)
    with torch.no_grad(), routing_totals(model.eval()) as totals:
        for row in tokens:
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    for name, total in totals.items():
        assert found[0][name].load.tolist() == total.tokens.tolist()


@pytest.mark.parametrize("kind", ["word", "bpe", "translation"])
def test_token_texts_put_together_are_the_text(kind, tmp_path, gnmt):
    tokenizer = AutoTokenizer.from_pretrained(gnmt if kind == "translation" else save_lm(tmp_path, kind=kind))
    text = " the  red cat saw\ta bird" if kind != "word" else "the red cat saw a bird"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = "".join(token_texts(tokenizer, ids))
    assert joined == {"word": f" {text}", "bpe": text, "translation": f" {text}"}[kind]
    assert token_texts(tokenizer, [tokenizer.eos_token_id])[0].strip() == tokenizer.eos_token


def test_parts_of_a_character_are_read_together(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_lm(tmp_path, kind="bpe"))
    ids = tokenizer("é€", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5 and all("\ufffd" in text for text in token_texts(tokenizer, ids))
    assert whole_characters(tokenizer, ids) == ["é", "", "€", "", ""]
    assert whole_characters(tokenizer, ids[:4]) == ["é", "", *token_texts(tokenizer, ids[2:4])]
    assert whole_characters(tokenizer, ids[1:2]) == token_texts(tokenizer, ids[1:2])


@pytest.fixture(scope="module")
def pages(lm, gnmt, tmp_path_factory):
    """The files of a report, by family."""
    folder = tmp_path_factory.mktemp("pages")
    options = {"num_contexts": 3, "context_width": 2, "batch_size": 4, "window_length": 8}
    return {
        "lstm_moe": routing_report(str(lm), [str(lm / "text.txt")], folder / "lm.html", **options),
        "gnmt_moe": routing_report(
            str(gnmt), [str(gnmt / "text.en"), str(gnmt / "text.de")], folder / "gnmt.html", **options
        ),
    }


def test_the_page_and_its_pictures_are_written(pages):
    for written in pages.values():
        assert list(written) == ["page", "plot", "history_plot"]
        for name in ("plot", "history_plot"):
            assert is_drawn(written[name])


def test_a_history_of_one_log_draws_bars_and_one_of_several_draws_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: drawn.append(figure.axes))
    for num_logs in (1, 3):
        write_history(tmp_path, ["encoder.layers.1", "decoder.layers.1"], num_logs)
        plot_expert_history(tmp_path / "expert_history.csv", tmp_path / "history.png")
    for axes in drawn[0]:
        assert not axes.lines and [bar.get_height() for bar in axes.patches][0] >= 0 and len(axes.patches) == 2
        assert axes.get_xlabel() == "layer, at step 10"
    for axes in drawn[1]:
        assert [len(line.get_xdata()) for line in axes.lines] == [3, 3] and not axes.patches
        assert axes.get_xlabel() == "training step"


def test_the_page_names_nothing_outside_of_itself(pages):
    page = Path(pages["gnmt_moe"]["page"]).read_text(encoding="utf-8")
    outside = page[: page.index('<script type="application/json"')] + page[page.index("const DATA") :]
    assert "default-src 'none'" in outside and "{{" not in outside.replace("${{", "")
    for word in (" src=", "href=", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML", "import("):
        assert word not in outside
    assert outside.count("http") == outside.count("http-equiv") + outside.count("http://www.w3.org/2000/svg")


def test_text_that_looks_like_markup_stays_text(pages):
    for family, written in pages.items():
        data = read_page(written["page"])  # finds the data's end at the first </script>
        side = data["sides"][{"lstm_moe": "", "gnmt_moe": "encoder"}[family]]
        words = [data["vocabulary"]["texts"][token] for token in unpack(side["tokens"])]
        for place, text in side["whole"]:
            words[place] = text
        assert NASTY in "".join(words) and "\ufffd" not in "".join(words)
        assert family == "lstm_moe" or ("the naïve café" in "".join(words) and side["whole"])


def test_contexts_are_the_surroundings_of_the_highest_gate_values(pages):
    data = read_page(pages["gnmt_moe"]["page"])
    for layer, lines in zip(data["layers"], (SOURCES, TARGETS)):
        offsets, gates = unpack(layer["contexts"]["offsets"]), unpack(layer["contexts"]["gates"])
        assert len(offsets) == layer["num_experts"] + 1 and np.diff(offsets).max() == 3
        for expert in range(layer["num_experts"]):
            assert (np.diff(gates[offsets[expert] : offsets[expert + 1]]) <= 0).all()
            contexts = contexts_of(data, layer)[expert]
            assert len(set(contexts)) == len(contexts)
            for token, words in contexts:
                assert token in words and len(words) < 60
                bare = words.replace("</s>", "").replace("<s>", "").strip()
                assert any(bare in line for line in lines)


def test_every_kept_token_has_the_experts_that_the_model_gives_it(gnmt, pages):
    data = read_page(pages["gnmt_moe"]["page"])
    text = PairText(encoded_pairs(gnmt), 1, 4, 200_000)
    model = AutoModelForSeq2SeqLM.from_pretrained(gnmt)
    routing = collect_routing(model, text.batches(model.config), {s: len(t.ids) for s, t in text.sides.items()})
    for layer in data["layers"]:
        kept, width = unpack(data["sides"][layer["side"]]["positions"]), layer["routing"]["width"]
        expected = routing[layer["name"]]
        assert width == model.config.num_experts_per_tok
        np.testing.assert_array_equal(
            unpack(layer["routing"]["experts"]).reshape(-1, width), expected.experts[kept, :width]
        )
        gates = unpack(layer["routing"]["gates"]).reshape(-1, width) / 65535
        np.testing.assert_allclose(gates, expected.gates[kept, :width], atol=1e-5)
        hits = {}
        for token, experts in zip(unpack(data["sides"][layer["side"]]["tokens"]).tolist(), expected.experts[kept]):
            for expert in experts[experts >= 0].tolist():  # all positions are kept here
                hits[token, expert] = hits.get((token, expert), 0) + 1
        favourites = layer["words"]["favourites"]
        experts, counts = (
            unpack(favourites[name]).reshape(-1, favourites["width"]).tolist() for name in ("experts", "hits")
        )
        for token in range(len(experts)):
            found = {e: n for e, n in zip(experts[token], counts[token]) if e != 0xFFFFFFFF}
            best = sorted((n for (t, _), n in hits.items() if t == token), reverse=True)[: favourites["width"]]
            assert found == {e: hits[token, e] for e in found} and sorted(found.values(), reverse=True) == best


def test_a_strictly_balanced_model_without_history_in_gzip(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    folder = save_gnmt(tmp_path, gating="strictly_balanced")
    for name in ("text.en", "text.de"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    (folder / "expert_history.csv").unlink()
    files = [str(folder / f"{name}.gz") for name in ("text.en", "text.de")]
    written = routing_report(str(folder), files, folder / "page.html", layers=["decoder.layers.1"])
    data = read_page(written["page"])
    assert [layer["name"] for layer in data["layers"]] == ["decoder.layers.1"] and "history_plot" not in written
    assert data["layers"][0]["history"] is None


def test_a_pair_that_chance_would_hardly_give_has_a_ratio():
    pairs, rows = PairCounts(4), np.array([[0, 1]] * 20_000 + [[2, 3]])
    pairs.add(rows, np.full(len(rows), 2))
    data = coactivation_data(pairs, np.bincount(rows.ravel()))
    load = np.bincount(rows.ravel())
    in_all = sum(load[a] * load[b] for a in range(4) for b in range(a))
    first, second, count, expected = data["top"][0]
    assert (first, second, count) == (2, 3, 1)
    assert expected == pytest.approx(len(rows) / in_all, rel=1e-5) and expected < 1e-4


def test_dense_and_single_experts_have_no_pairs(tmp_path):  # with pictures, which have no pairs to draw
    dense, one = {"gating": "softmax", "num_experts_per_tok": None}, {"num_experts": 1, "num_experts_per_tok": 1}
    for name, config in {"dense": dense, "one": one}.items():
        (tmp_path / name).mkdir()
        folder = save_lm(tmp_path / name, **config)
        written = routing_report(str(folder), [str(folder / "text.txt")], tmp_path / f"{name}.html")
        assert read_page(written["page"])["layers"][0]["coactivation"] is None


def test_the_command_writes_a_report_and_says_where(lm, tmp_path, monkeypatch, call_command):
    without_pictures(monkeypatch)
    status, printed, _ = call_command("report", lm, lm / "text.txt", "-o", tmp_path / "r.html", "--max_tokens", 50)
    assert status == 0 and f"page = {tmp_path / 'r.html'}" in printed
    assert read_page(tmp_path / "r.html")["layers"][0]["summary"]["tokens"] == 50


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("lm", {"output": "page.txt"}, "output=page.txt must end in .html"),
        ("lm", {"output": "nowhere/page.html"}, "there is no folder nowhere"),
        ("lm", {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ("lm", {"num_contexts": -1}, "num_contexts=-1 must be at least 1"),
        ("lm", {"layers": ["layers.0"]}, "'layers.0' is not a MoE layer of the model, use one of layers.1"),
        ("lm", {"files": ["nothing.txt"]}, "no file matches 'nothing.txt'"),
        ("lm", {"history": "nothing.csv"}, "history=nothing.csv"),
        ("lm", {"target_language": "de"}, "target_language='de' is for translation models"),
        ("gnmt", {"files": ["only.en"]}, "a translation model needs two"),
        ("gnmt", {"target_language": "xx"}, "target_language='xx'"),
        ("lm", {"model": "nowhere"}, "model=nowhere: cannot be loaded"),
        ("lm", {"model": "bert"}, "model=bert has model_type='bert', expected one of ['gnmt_moe', 'lstm_moe']"),
    ],
)
def test_bad_input_is_one_line(family, changes, named, lm, gnmt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BertConfig().save_pretrained("bert")
    folder = {"lm": lm, "gnmt": gnmt}[family]
    files = [str(folder / name) for name in (["text.txt"] if family == "lm" else ["text.en", "text.de"])]
    arguments = {"model": str(folder), "files": files, "output": "page.html"} | changes
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        routing_report(**arguments)
    assert "\n" not in str(caught.value) and not Path("page.html").exists()


def test_a_broken_tokenizer_is_named(lm, tmp_path):
    folder = copytree(lm, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")  # which raises a bare Exception
    for read in (
        lambda: routing_report(str(folder), [str(folder / "text.txt")], tmp_path / "r.html"),
        lambda: export(str(folder), tmp_path / "exported"),
    ):
        with pytest.raises(InputError, match=f"{folder}.*: the tokenizer cannot be loaded"):
            read()


def test_a_history_that_is_none_is_named(tmp_path):
    header = "step,layer,cv_importance,cv_load,max_over_mean_load,dead_experts\n"
    for text in ("step,layer\n1,layers.1\n", "a\nb\n", f"{header}x", f"{header}1,layers.1,a,0,0,0\n"):
        (tmp_path / "h.csv").write_text(text)
        with pytest.raises(InputError, match="h.csv: not an expert_history.csv"):
            read_expert_history(tmp_path / "h.csv")


def test_an_installed_wheel_has_the_page(tmp_path):
    left_out = ignore_patterns(".*", "runs", "build", "*.egg-info", "tests", "__pycache__")
    copytree(ROOT, tmp_path / "tree", ignore=left_out)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    command = [sys.executable, "-m", "pip", "wheel", *options, "./tree"]
    without_compiler = os.environ | {"CC": "false"}  # which installs a package without kernels
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, env=without_compiler)
    (wheel,) = tmp_path.glob("*.whl")
    pages = {path.name for path in (ROOT / "src/moe_hf/routing/page").iterdir() if path.is_file()}
    prefix = "moe_hf/routing/page/"
    found = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix)}
    assert found == pages and "page.html" in found
