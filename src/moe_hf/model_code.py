"""Copies the code of a model beside its weights, so that its folder loads by path alone, without this package.

Trainings and the commands of `moe-hf` write such folders. The code takes about 125 kB.

Reason: lm-evaluation-harness, `transformers serve` and TRL load a path in a process that never imports `moe_hf`. In a
process that imports `moe_hf`, Transformers prefers the package's classes and needs no `trust_remote_code`. A
training's `checkpoint-N` does not get the code, because only this package resumes from a checkpoint.

`with_code` (hub.py) does not fit: the library stores its setting in the class. Every checkpoint, and every other model
of the class in the process, would get the code too.
"""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .families import FAMILIES

MODELS = Path(__file__).parent / "models"


def add_code(folder: str | Path) -> None:
    """Add the model's code to a folder that `save_pretrained` wrote, if the model belongs to this package.

    The function also writes the Auto class into `architectures`: `transformers serve` looks that name up in the module
    `transformers`, which does not have `LstmMoeForCausalLM`.

    Args:
        folder: the folder with the model's config.json.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    family = FAMILIES.get(config.get("model_type"))
    if family is None:  # a model of another package, or an adapter without config.json
        return
    auto_classes = {value.partition(".")[2]: name for name, value in family.auto_map.items()}
    config["auto_map"] = family.auto_map
    config["architectures"] = [auto_classes.get(name, name) for name in config["architectures"]]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for module in {value.partition(".")[0] for value in family.auto_map.values()}:
        file = MODELS / f"{module}.py"
        for needed in [file, *get_relative_import_files(file)]:
            shutil.copyfile(needed, Path(folder) / Path(needed).name)
