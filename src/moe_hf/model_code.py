"""Copies the code of a model beside its weights, so that its folder loads by path alone, without this package.

Trainings and the commands of `moe-hf` write such folders. The code takes about 125 kB and a tenth of a second.

Why: lm-evaluation-harness, `transformers serve` and TRL load a path in a process that never imports `moe_hf`.
A process that does import `moe_hf` needs no `trust_remote_code`: Transformers then prefers the classes of the package.
A training's `checkpoint-N` gets no code. Only this package resumes from it.

Why not `with_code` (hub.py): the library stores that mark in the class. Every checkpoint, and every other model of the
class in the process, would get the code too.
"""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .families import FAMILIES

MODELS = Path(__file__).parent / "models"


def add_code(folder: str | Path) -> None:
    """Add the code to a folder that `save_pretrained` wrote; a folder without a model of this package is left alone.

    It also writes the Auto class into `architectures`. `transformers serve` looks that name up in the module
    `transformers`, where it would not find `LstmMoeForCausalLM`.

    Args:
        folder: with the model's config.json.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    family = FAMILIES.get(config.get("model_type"))
    if family is None:  # another family's model, or an adapter, which has no config.json
        return
    auto_classes = {value.partition(".")[2]: name for name, value in family.auto_map.items()}
    config["auto_map"] = family.auto_map
    config["architectures"] = [auto_classes.get(name, name) for name in config["architectures"]]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for module in {value.partition(".")[0] for value in family.auto_map.values()}:
        file = MODELS / f"{module}.py"
        for needed in [file, *get_relative_import_files(file)]:
            shutil.copyfile(needed, Path(folder) / Path(needed).name)
