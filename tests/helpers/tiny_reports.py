"""Tiny models of both families with text to report on, and the contents of a report's page."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny_gnmt, tiny_lm

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.routing import write_page as routing_report
from moe_hf.training.callbacks import STATISTICS

# Text that breaks a page which treats it as markup, code or a placeholder.
NASTY = '</script><script>window.broken=1</script> <!-- <img src=x onerror="window.broken=1"> {{page.js}} &lt; \\u003c'
LINES = [
    f"the {color} {animal} saw a {other}"
    for color in ("red", "blue")
    for animal in ("cat", "dog", "cow")
    for other in ("bird", "tree")
]
SOURCES = [*LINES * 3, NASTY, "the naïve café"]
TARGETS = [*[line.replace("the", "der").replace("saw", "sah") for line in LINES * 3], NASTY, "das naïve Café"]


def save_lm(folder, kind="word", num_logs=5, **config) -> Path:
    """Writes a model, its tokenizer, text.txt and the history of a training to `folder`."""
    lines = [*LINES * 4, NASTY, "the red cat"]
    tokenizer = train_tokenizer(lines, kind=kind, vocab_size=60 if kind == "word" else 300)
    model = tiny_lm(torch.float32, vocab_size=len(tokenizer), **config)
    write_history(folder, ["layers.1"], num_logs)
    return _save(folder, model, tokenizer, {"text.txt": lines})


def save_gnmt(folder, **config) -> Path:
    tokenizer = train_translation_tokenizer([*SOURCES, *TARGETS], vocab_size=300)
    model = tiny_gnmt(torch.float32, vocab_size=len(tokenizer), **config)
    write_history(folder, ["encoder.layers.2", "decoder.layers.1"])
    return _save(folder, model, tokenizer, {"text.en": SOURCES, "text.de": TARGETS})


def _save(folder, model, tokenizer, texts) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def write_history(folder, layers, num_logs=5) -> None:
    rows = [
        f"{10 * step},{layer},0.1,0.2,{1 / step},{2 / step},{1 + 1 / step},0"
        for step in range(1, num_logs + 1)
        for layer in layers
    ]
    text = "\n".join([",".join(["step", "layer", *STATISTICS]), *rows]) + "\n"
    (folder / "expert_history.csv").write_text(text, encoding="utf-8")


def read_page(file) -> dict:
    """Returns the data of a report's page."""
    page = Path(file).read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(found)


def unpack(packed) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["bytes"]), dtype=f"<{packed['type']}")


def contexts_of(data, layer) -> list[list[tuple[str, str]]]:
    """Finds, independently of the page's code, the (token, words around it) to show for each expert."""
    side, vocabulary, width = data["sides"][layer["side"]], data["vocabulary"]["texts"], data["context_width"]
    tokens, positions, starts = (unpack(side[name]).tolist() for name in ("tokens", "positions", "starts"))
    texts = {position: vocabulary[token] for position, token in zip(positions, tokens)}
    texts |= {positions[place]: text for place, text in side["whole"]}
    start_positions = {positions[i] for i in starts}
    contexts = []
    for place in unpack(layer["contexts"]["places"]).tolist():
        middle = first = last = positions[place]
        while middle - first < width and first not in start_positions and first > 0:
            first -= 1
        while last - middle < width and last + 1 < side["length"] and last + 1 not in start_positions:
            last += 1
        contexts.append((texts[middle], "".join(texts[position] for position in range(first, last + 1))))
    offsets = unpack(layer["contexts"]["offsets"]).tolist()
    return [contexts[start:stop] for start, stop in zip(offsets, offsets[1:])]


def without_pictures(monkeypatch) -> None:
    """Makes reports write empty pictures: real pictures cost more than the rest of a tiny report."""
    for name in ("plot_routing", "plot_curves"):
        monkeypatch.setattr(routing_report, name, lambda data, file: Path(file).touch())
