"""Folders of models and tokenizers, and the records in such folders, that are damaged or of another kind."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import Case, Place, judge
from safetensors.torch import load_file, save_file
from transformers.utils import is_peft_available

INDEX = "model.safetensors.index.json"
HISTORY = "step,layer,cv_importance,cv_load,max_over_mean_load,dead_experts\n"


def lm_with(damage: Callable[[Path], None], command: str = "evaluate-lm"):
    """A command on a language model's folder after `damage(folder)`; "average" has it in its last checkpoint."""

    def make(place: Place) -> list:
        folder = place.lm()
        damage(folder / "checkpoint-4" if command == "average" else folder)
        text = place.file("text.txt", "the cat saw a dog\n" * 40)
        out = place / "out"
        return {
            "evaluate-lm": [command, folder, text],
            "evaluate": [command, folder, text],
            "record": ["evaluate-lm", folder, text, "--record"],
            "report": [command, folder, text, "-o", place / "report.html"],
            "prune": [command, folder, text, out, "--keep", 2],
            "upcycle": [command, folder, out, "--num_experts", 8],
            "average": [command, folder, out, "--last", 2],
            "push": [command, folder, "me/model", "--dry-run", out],
            "translate": [command, folder, text],
        }[command]

    return make


def translator_with(damage: Callable[[Path], None], command: str = "translate"):
    """The same of a translation model."""

    def make(place: Place) -> list:
        folder = place.translator()
        damage(folder)
        files = [place.file(f"text.{language}", "a dog\nno\n") for language in ("en", "de")]
        return {
            "translate": [command, folder, files[0]],
            "evaluate-lm": [command, folder, files[0]],
            "evaluate-translation": [command, folder, *files],
            "prune": [command, folder, *files, place / "out", "--keep", 2],
        }[command]

    return make


def fine_tuned(damage: Callable[[Path], None], with_text: bool = False, **arguments):
    """A training that starts from a damaged language model; only faults of weights are found after its text."""

    def make(place: Place) -> list:
        damage(place.lm())
        arguments.setdefault("model_name_or_path", str(place / "lm"))
        return ["train-lm", place.lm_config(with_text=with_text, **arguments)]

    return make


def resumed(damage: Callable[[Path], None]):
    """A run that goes on from a damaged checkpoint."""

    def make(place: Place) -> list:
        folder = place.lm("run")
        damage(folder / "checkpoint-2")
        changes = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "save_strategy": "steps", "save_steps": 2}
        return ["train-lm", place.lm_config(with_text=True, eval_strategy="no", **changes)]

    return make


def good(folder: Path) -> None:
    """No damage."""


def only_checkpoints(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()


def write(name: str, content: str | bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def half(name: str):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def without(name: str):
    return lambda folder: (folder / name).unlink()


def with_values(name: str, **values):
    def damage(folder: Path) -> None:
        old = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(old | values), encoding="utf-8")

    return damage


def with_weights(change: Callable[[dict], None]):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def lacks(name: str):
    return with_weights(lambda weights: [weights.pop(key) for key in list(weights) if name in key])


def has_value(name: str, value: float, dtype: torch.dtype | None = None):
    def change(weights: dict) -> None:
        for key in weights:
            weights[key] = weights[key].to(dtype or weights[key].dtype)
            if name in key:
                weights[key].view(-1)[3] = value

    return with_weights(change)


def has_shape(name: str):
    return with_weights(lambda weights: weights.update({key: torch.zeros(3, 3) for key in weights if name in key}))


def indexed(file: str | int):
    """The weights in a file of another name, and an index that names `file` for them."""

    def damage(folder: Path) -> None:
        names = load_file(folder / "model.safetensors").keys()
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


def with_vocabulary(change: Callable[[dict], dict]):
    def damage(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["model"]["vocab"] = change(tokenizer["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    return damage


def no_model(place: Place, outcome) -> str | None:
    """Whether a refused command left weights in its output folder."""
    return "weights were written" if list((place / "out").glob("*.safetensors")) else None


LARGER = with_vocabulary(lambda ids: ids | {f"new{number}": len(ids) + number for number in range(9)})
SMALLER = with_vocabulary(lambda ids: {token: number for token, number in ids.items() if number < 30})
UP_PROJ = "model.layers.1.experts.up_proj"
LACKS_LSTM = ("the weights lack model.layers.0.bias and 2 more", "at random")

CASES = [
    # Files.
    Case(
        "truncated weights", lm_with(half("model.safetensors")), ("model=", "lm: cannot be loaded (model.safetensors")
    ),
    Case("garbled weights", translator_with(write("model.safetensors", "x" * 99)), ("model=", "model.safetensors")),
    Case("no weights", lm_with(without("model.safetensors")), ("model=", "no file named model.safetensors")),
    Case(
        "index outside of the folder",
        lm_with(indexed("../x.safetensors")),
        (INDEX, "'../x.safetensors'", "same folder"),
    ),
    Case("index of a missing file", lm_with(indexed("x.safetensors")), (INDEX, "'x.safetensors'", "missing")),
    Case("index of a number", lm_with(indexed(7)), (INDEX, "names 7")),
    Case(
        "index that is a list",
        lm_with(lambda folder: (without("model.safetensors")(folder), write(INDEX, "[1]")(folder))),
        (INDEX, "holds a list, expected a JSON map"),
    ),
    Case("truncated config.json", lm_with(half("config.json"), "evaluate"), ("model=", "config.json cannot be read")),
    Case("config.json of a list", translator_with(write("config.json", "[1]")), ("config.json holds a list",)),
    Case("config.json without end", lm_with(write("config.json", "[" * 100_000)), ("config.json cannot be read",)),
    Case("no config.json", lm_with(without("config.json"), "push"), ("model=", "no config.json")),
    Case(
        "truncated generation_config.json",
        lm_with(half("generation_config.json"), "upcycle"),
        ("model=", "generation_config.json cannot be read"),
        check=no_model,
    ),
    Case(
        "empty tokenizer.json", lm_with(write("tokenizer.json", "")), ("model=", "tokenizer.json is not a tokenizer")
    ),
    Case(
        "tokenizer.json of {}", lm_with(write("tokenizer.json", "{}"), "report"), ("model=", "tokenizer.json is not")
    ),
    Case("no tokenizer.json", translator_with(without("tokenizer.json")), ("model=", "without tokenizer.json")),
    Case(
        "truncated tokenizer_config.json", lm_with(half("tokenizer_config.json")), ("tokenizer_config.json cannot be",)
    ),
    Case(
        "special_tokens_map.json of a list",
        lm_with(write("special_tokens_map.json", "[]")),
        ("special_tokens_map.json",),
    ),
    Case("adapter", lm_with(write("adapter_config.json", "{}")), ("adapter_config.json", "peft")),
    # Values.
    Case("num_experts of -1", lm_with(with_values("config.json", num_experts=-1)), ("model=", "num_experts=-1")),
    Case("num_experts of a text", lm_with(with_values("config.json", num_experts="four")), ("num_experts", "four")),
    Case(
        "num_experts of null", translator_with(with_values("config.json", num_experts=None)), ("num_experts", "None")
    ),
    Case(
        "vocab_size of 0",
        lm_with(with_values("config.json", vocab_size=0), "average"),
        ("checkpoint=", "vocab_size=0"),
    ),
    Case("another dtype", lm_with(with_values("config.json", dtype="evil")), ("config.json", "wrong type", "evil")),
    Case(
        "another quantization",
        lm_with(with_values("config.json", quantization_config={"quant_method": "gptq"})),
        "gptq",
    ),
    Case(
        "another num_beams", translator_with(with_values("generation_config.json", num_beams="x")), ("num_beams='x'",)
    ),
    Case(
        "start beyond the words",
        translator_with(with_values("generation_config.json", decoder_start_token_id=5000)),
        "5000",
    ),
    Case(
        "temperature of -1",
        translator_with(with_values("generation_config.json", do_sample=True, temperature=-1.0)),
        ("generation_config.json", "temperature"),
    ),
    Case(
        "a text for model_max_length",
        lm_with(with_values("tokenizer_config.json", model_max_length="x")),
        "model_max_length='x'",
    ),
    Case(
        "no eos_token", lm_with(with_values("tokenizer_config.json", eos_token=None)), ("model=", "has no eos_token")
    ),
    # Weights.
    Case("missing weights, evaluate-lm", lm_with(lacks("layers.0")), LACKS_LSTM),
    Case("missing weights, report", lm_with(lacks("layers.0"), "report"), LACKS_LSTM),
    Case("missing weights, prune", lm_with(lacks("layers.0"), "prune"), LACKS_LSTM, check=no_model),
    Case("missing weights, upcycle", lm_with(lacks("layers.0"), "upcycle"), LACKS_LSTM, check=no_model),
    Case("missing weights, push", lm_with(lacks("layers.0"), "push"), LACKS_LSTM, check=no_model),
    Case(
        "missing weights, average", lm_with(lacks("layers.0"), "average"), ("checkpoint=", *LACKS_LSTM), check=no_model
    ),
    Case("missing weights, translate", translator_with(lacks("encoder.layers.0")), ("model=", "at random")),
    Case("missing weights, fine-tuning", fine_tuned(lacks("layers.0"), True), ("model_name_or_path=", *LACKS_LSTM)),
    Case("missing weights, resuming", resumed(lacks("layers.0")), ("checkpoint", *LACKS_LSTM)),
    Case("a missing gate", lm_with(lacks("gate.weight")), "model.layers.1.gate.weight"),
    Case("weights of another shape", lm_with(has_shape("up_proj")), (UP_PROJ, "(3, 3)", "(4, 8, 8)")),
    Case("weights of another shape, resuming", resumed(has_shape("up_proj")), ("checkpoint", UP_PROJ, "[3, 3]")),
    Case(
        "fewer layers than weights",
        lm_with(with_values("config.json", layer_pattern=["lstm", "moe"])),
        "layers.2.bias",
    ),
    Case("NaN, evaluate-lm", lm_with(has_value("up_proj", math.nan)), ("model=", f"{UP_PROJ} are not finite")),
    Case("NaN, translate", translator_with(has_value("up_proj", math.nan)), ("up_proj are not finite",)),
    Case(
        "infinite, push", lm_with(has_value("embed", math.inf), "push"), "embed_tokens.weight are not", check=no_model
    ),
    Case("NaN, average", lm_with(has_value("up_proj", math.nan), "average"), (f"{UP_PROJ} are not",), check=no_model),
    Case("NaN, bfloat16", lm_with(has_value("up_proj", math.nan, torch.bfloat16), "prune"), UP_PROJ, check=no_model),
    Case(
        "infinite, float16",
        lm_with(has_value("up_proj", -math.inf, torch.float16), "upcycle"),
        UP_PROJ,
        check=no_model,
    ),
    Case("NaN, fine-tuning", fine_tuned(has_value("embed", math.nan), True), ("model_name_or_path=", "not finite")),
    Case("NaN, resuming", resumed(has_value("embed", math.nan)), ("checkpoint", "embed_tokens.weight holds NaN")),
    # Another kind.
    Case("tokenizer with more tokens", lm_with(LARGER), ("model=", "59 tokens, more than vocab_size=50")),
    Case("tokenizer with fewer tokens", lm_with(SMALLER), ("model=", "30 tokens, fewer than vocab_size=50")),
    Case(
        "another end",
        lm_with(with_values("config.json", eos_token_id=7), "upcycle"),
        ("eos_token_id=0", "eos_token_id=7"),
    ),
    Case(
        "a language model to translate",
        lm_with(good, "translate"),
        ("model=", "language model", "expected a translation"),
    ),
    Case(
        "a translation model for evaluate-lm",
        translator_with(good, "evaluate-lm"),
        ("model=", "expected a language model"),
    ),
    Case(
        "a translation model to fine-tune",
        lambda place: ["train-lm", place.lm_config(model_name_or_path=str(place.translator()))],
        ("model_name_or_path=", "translation model", "expected a language model"),
    ),
    Case(
        "model_type of the future", lm_with(with_values("config.json", model_type="lstm_moe_3"), "evaluate"), "model="
    ),
    Case(
        "a file",
        lambda place: ["evaluate", place.file("model", "x"), "text"],
        ("model=", "is a file, expected a folder"),
    ),
    Case(
        "an empty folder",
        lambda place: ["translate", place.folder, "text"],
        ("model=", "the folder has no config.json"),
    ),
    Case("a run that has not ended", lm_with(only_checkpoints, "evaluate"), ("model=", "lm/checkpoint-4")),
    Case("no such folder", lambda place: ["translate", place / "nowhere", "text"], ("model=", "no such folder")),
    Case(
        "no such model to fine-tune",
        lambda place: ["train-lm", place.lm_config(model_name_or_path="/nowhere/model")],
        ("model_name_or_path=/nowhere/model", "no such folder"),
    ),
    Case(
        "no such tokenizer",
        lambda place: ["train-lm", place.lm_config(tokenizer_name_or_path="/nowhere/tokenizer")],
        ("tokenizer_name_or_path=/nowhere/tokenizer", "no such folder"),
    ),
    # Records.
    Case(
        "truncated evaluations.json, push",
        lm_with(write("evaluations.json", "[{"), "push"),
        "evaluations.json cannot be",
    ),
    Case(
        "truncated evaluations.json, record",
        lm_with(write("evaluations.json", "[{"), "record"),
        "evaluations.json cannot",
    ),
    Case(
        "another evaluations.json",
        lm_with(write("evaluations.json", '[{"a": 1}]'), "push"),
        "evaluation 1 of 1 is damaged",
    ),
    Case(
        "a text in eval_results.json",
        lm_with(write("eval_results.json", '{"eval_perplexity_per_word": "x"}'), "push"),
        ("eval_results.json: perplexity_per_word='x'", "delete it"),
        check=no_model,
    ),
    Case(
        "trainer_state.json of null",
        lm_with(write("trainer_state.json", "null"), "push"),
        "trainer_state.json holds null",
    ),
    Case(
        "empty train_results.json",
        lm_with(write("train_results.json", ""), "push"),
        "train_results.json cannot be read",
    ),
    Case("empty run.yaml", translator_with(write("run.yaml", ""), "evaluate-translation"), "run.yaml holds null"),
    Case(
        "a number for files in run.yaml",
        lm_with(write("run.yaml", "validation_files: 7"), "push"),
        "validation_files=7",
    ),
    Case("empty expert_history.csv", lm_with(write("expert_history.csv", ""), "report"), "expert_history.csv"),
    Case(
        "words in expert_history.csv", lm_with(write("expert_history.csv", f"{HISTORY}x,l,y,1,1,1\n"), "push"), "'x'"
    ),
]


if is_peft_available():  # which then reads the adapter
    CASES = [case for case in CASES if case.name != "adapter"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_named(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"


def test_a_padded_vocabulary_is_not_another_tokenizers(tmp_path, call_command):
    place = Place(tmp_path)
    arguments = lm_with(lambda folder: _pad_vocabulary(folder, 64))(place)
    status, _, error = call_command(*arguments)
    assert status == 0, error


def _pad_vocabulary(folder: Path, size: int) -> None:
    def pad(weights: dict) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.cat([weights[name], weights[name].new_zeros(size - len(weights[name]), 8)])

    with_weights(pad)(folder)
    with_values("config.json", vocab_size=size)(folder)
