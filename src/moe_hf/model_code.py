"""The code of a model beside its weights, so that a folder loads by its path alone, without this package.

What our trainings and commands write has its code: about 125 kB and a tenth of a second. Libraries that take a path,
such as lm-evaluation-harness and `transformers serve`, run in processes of their own, where nobody imports `moe_hf`.
Whoever does import it needs no `trust_remote_code`, and gets the classes of the package and not those of the folder.
A training's `checkpoint-N` has no code: it is there to go on from, by this package.

The files are copied when a folder is written. `with_code` (hub.py) instead marks a class, which the library keeps for
all models of that class in the process: every checkpoint would have the code then, and the models of other trainings.
"""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

MODELS = Path(__file__).parent / "models"
# What each Auto class loads, by model type.
AUTO_MAPS = {
    "lstm_moe": {
        "AutoConfig": "configuration_lstm_moe.LstmMoeConfig",
        "AutoModel": "modeling_lstm_moe.LstmMoeModel",
        "AutoModelForCausalLM": "modeling_lstm_moe.LstmMoeForCausalLM",
    },
    "gnmt_moe": {
        "AutoConfig": "configuration_gnmt_moe.GnmtMoeConfig",
        "AutoModel": "modeling_gnmt_moe.GnmtMoeModel",
        "AutoModelForSeq2SeqLM": "modeling_gnmt_moe.GnmtMoeForConditionalGeneration",
    },
}


def add_code(folder: str | Path) -> None:
    """Put the code into a folder that `save_pretrained` wrote; one without a model of this package stays as it is.

    `architectures` then names the Auto class: `transformers serve` and TRL look for that name in `transformers`, which
    has no class of ours, and would go no further.

    Args:
        folder: with the model's config.json.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    auto_map = AUTO_MAPS.get(config.get("model_type"))
    if auto_map is None:  # a model of Transformers' own, or an adapter, which has no such file
        return
    auto_classes = {value.partition(".")[2]: name for name, value in auto_map.items()}
    config["auto_map"] = auto_map
    config["architectures"] = [auto_classes.get(name, name) for name in config["architectures"]]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for module in {value.partition(".")[0] for value in auto_map.values()}:
        file = MODELS / f"{module}.py"
        for needed in [file, *get_relative_import_files(file)]:
            shutil.copyfile(needed, Path(folder) / Path(needed).name)
