"""Folders with planted code or pickles: none of the code runs, and the terminal shows no question."""

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs import Case, Place, judge
from transformers.utils import is_peft_available

import moe_hf
from moe_hf.data.tokenizers import load_tokenizer
from moe_hf.errors import InputError
from moe_hf.loading import load_model_and_tokenizer


class Planted:
    """What `pickle.load` and an unsafe `torch.load` would run: it makes the folder `marker`."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)


def plant_code(folder: Path, place: Place) -> None:
    """Writes Python files to a folder; the import of any of them creates the marker."""
    code = (
        f"import os\nos.makedirs({str(place / 'marker')!r}, exist_ok=True)\n"
        "from transformers import PreTrainedConfig as Config, PreTrainedTokenizerFast as Tokenizer\n"
        "Model = generate = None\n"
    )
    (folder / "custom_generate").mkdir(exist_ok=True)
    for name in ("evil.py", "custom_generate/generate.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(code, encoding="utf-8")


def change(file: Path, **values) -> None:
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(old | values), encoding="utf-8")


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSeq2SeqLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


def of_config(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    change(folder / "config.json", auto_map=AUTO_MAP, model_type="evil")


def of_known_config(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    change(folder / "config.json", auto_map=AUTO_MAP)


def of_tokenizer(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")


def of_generate(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    change(folder / "generation_config.json", custom_generate=str(folder))


def of_pickled_weights(folder: Path, place: Place) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Planted(place / "marker")}, folder / "pytorch_model.bin")


def of_indexed_pickle(folder: Path, place: Place) -> None:
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model-00001-of-00001.bin", "wb") as file:
        pickle.dump({"a": Planted(place / "marker")}, file)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    change(folder / "pytorch_model.bin.index.json", **index)


def of_adapter(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    auto_mapping = {"base_model_class": "Model", "parent_library": "evil"}
    change(folder / "adapter_config.json", peft_type="LORA", auto_mapping=auto_mapping)
    torch.save({"a": Planted(place / "marker")}, folder / "adapter_model.bin")


def of_kernel(folder: Path, place: Place) -> None:
    change(folder / "config.json", attn_implementation="me/evil")


def not_run(place: Place, outcome) -> str | None:
    if (place / "marker").exists():
        return "planted code was run"
    return "asked on the terminal" if "[y/N]" in outcome.out + outcome.err else None


def lm_command(plant: Callable[[Path, Place], None], command: str):
    def make(place: Place) -> list:
        folder = place.lm()
        plant(folder / "checkpoint-4" if command == "average" else folder, place)
        text = place.file("text.txt", "the cat saw a dog\n" * 40)
        return [command, folder] + {
            "evaluate": [text],
            "evaluate-lm": [text],
            "report": [text, "-o", place / "report.html"],
            "prune": [text, place / "out", "--keep", 2],
            "upcycle": [place / "out", "--num_experts", 8],
            "average": [place / "out", "--last", 2],
            "push": ["me/model", "--dry-run", place / "out"],
        }[command]

    return make


def translator_command(plant: Callable[[Path, Place], None], command: str):
    def make(place: Place) -> list:
        folder = place.translator()
        plant(folder, place)
        files = [place.file(f"text.{language}", "a dog\nno\n") for language in ("en", "de")]
        return [command, folder, *files[: 1 if command == "translate" else 2]]

    return make


def fine_tuning(plant: Callable[[Path, Place], None], argument: str):
    def make(place: Place) -> list:
        folder = place.lm()
        plant(folder, place)
        return ["train-lm", place.lm_config(with_text=True, max_steps=1, **{argument: str(folder)})]

    return make


def dataset(write: Callable[[Path, Place], None]):
    """A training on a folder that `write` makes, as `dataset_name`."""

    def make(place: Place) -> list:
        (place / "data").mkdir()
        write(place / "data", place)
        values = {"dataset_name": str(place / "data"), "train_files": None, "validation_files": None}
        return ["train-lm", place.lm_config(**values, eval_strategy="no")]

    return make


def pickles(folder: Path, place: Place) -> None:
    for name in ("train.pkl", "train.pickle", "train.pt"):
        (folder / name).write_bytes(pickle.dumps(Planted(place / "marker")))


def script(folder: Path, place: Place) -> None:
    plant_code(folder, place)
    (folder / "evil.py").rename(folder / "data.py")


def web_dataset(folder: Path, place: Place) -> None:
    pickles(folder, place)
    torch.save(Planted(place / "marker"), folder / "0.pth")
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name, member in (("train.pkl", "0.pkl"), ("train.pickle", "0.pickle"), ("0.pth", "0.pth")):
            archive.add(folder / name, member)
    for name in ("train.pkl", "train.pickle", "train.pt", "0.pth"):
        (folder / name).unlink()


def yaml_with_code(folder: Path, place: Place) -> None:
    tag = "!!python/object/apply:os.makedirs"
    (folder / "run.yaml").write_text(f"seed: {tag} [{str(place / 'marker')!r}]\n", encoding="utf-8")


def script_itself(place: Place) -> list:
    script(place.folder, place)
    return ["train-lm", place.lm_config(dataset_name=str(place / "data.py"), train_files=None)]


COMMANDS = ("evaluate", "evaluate-lm", "report", "prune", "upcycle", "average", "push")
TRANSLATIONS = ("translate", "evaluate-translation")
REFUSED = {
    "a config": (of_config, "code of its own"),
    "a tokenizer": (of_tokenizer, "the tokenizer cannot be loaded (it needs code of its own"),
    "pickled weights": (of_pickled_weights, "pytorch_model.bin is damaged, or has code in it"),
    "a kernel": (of_kernel, "attn_implementation='me/evil' needs code, which is not run here"),
}
# The classes of this package are loaded instead of the planted classes.
IGNORED = {"a known config": of_known_config, "generate()": of_generate}

CASES = [
    *(
        Case(f"code of {name}, {command}", lm_command(plant, command), says, check=not_run)
        for name, (plant, says) in REFUSED.items()
        for command in COMMANDS
        if (name, command) != ("pickled weights", "average")
    ),
    *(
        Case(f"code of {name}, {command}", translator_command(plant, command), says, check=not_run)
        for name, (plant, says) in REFUSED.items()
        for command in TRANSLATIONS
    ),
    *(
        Case(f"code of {name}, {command}", make(plant, command), ends="recovers", check=not_run)
        for name, plant in IGNORED.items()
        for make, command in (
            (lm_command, "evaluate-lm"),
            (lm_command, "push"),
            (lm_command, "upcycle"),
            (translator_command, "translate"),
            (translator_command, "evaluate-translation"),
        )
    ),
    Case("pickled weights, average", lm_command(of_pickled_weights, "average"), "model.safetensors", check=not_run),
    Case("indexed pickle", lm_command(of_indexed_pickle, "evaluate"), ("model=", "has code in it"), check=not_run),
    Case("adapter", lm_command(of_adapter, "evaluate-lm"), "adapter_config.json", check=not_run),
    Case("run.yaml", lm_command(yaml_with_code, "push"), "run.yaml cannot be read", check=not_run),
    Case(
        "model to fine-tune",
        fine_tuning(of_config, "model_name_or_path"),
        ("model_name_or_path=", "code of its own"),
        check=not_run,
    ),
    Case(
        "pickle to fine-tune", fine_tuning(of_pickled_weights, "model_name_or_path"), "has code in it", check=not_run
    ),
    Case(
        "tokenizer of a training",
        fine_tuning(of_tokenizer, "tokenizer_name_or_path"),
        ("tokenizer_name_or_path=", "code of its own"),
        check=not_run,
    ),
    Case("dataset of pickles", dataset(pickles), ("data", "cannot be loaded"), check=not_run),
    Case("dataset with a script", dataset(script), ("data", "cannot be loaded"), check=not_run),
    Case("dataset that is a script", script_itself, ("data.py", "cannot be loaded"), check=not_run),
    Case("web dataset of pickles", dataset(web_dataset), "data", check=not_run),
]


if is_peft_available():  # which then reads the adapter
    CASES = [case for case in CASES if case.name != "adapter"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planted_code_does_not_run(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"


@pytest.mark.parametrize("load", [load_model_and_tokenizer, load_tokenizer, lambda path: _pipeline(path)])
def test_python_refuses_it_too_and_asks_nothing(load, tmp_path, monkeypatch):
    place = Place(tmp_path)
    folder = place.translator()
    of_config(folder, place)
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class=None)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(InputError, match="code of its own"):
        load(str(folder))
    assert not (place / "marker").exists()


def _pipeline(path: str):
    return moe_hf.pipeline("translation", model=path)


def test_a_planted_module_would_have_made_the_marker(tmp_path):
    """The cases above can fail: the planted code and pickle create the marker if they run."""
    place = Place(tmp_path)
    plant_code(place.folder, place)
    exec((place / "evil.py").read_text(encoding="utf-8"), {})
    assert (place / "marker").is_dir()
    (place / "marker").rmdir()
    pickle.loads(pickle.dumps(Planted(place / "marker")))
    assert (place / "marker").is_dir()
