"""One model from the last checkpoints of a run: the mean of their weights."""

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.distributed.checkpoint import is_sharded_checkpoint

from .errors import InputError
from .loading import check_finite, load_config, load_pretrained
from .run_folder import AVERAGED_FILE, CONFIG_FILE, HISTORY_FILE, check_checkpoint, list_checkpoints


def last_checkpoints(run: str, number: int) -> list[Path]:
    """The last checkpoints of a run, by rising step.

    Args:
        run: its output folder, which keeps as many as its `save_total_limit`.
        number: how many, at least 2.

    Raises:
        InputError: there is no such folder, there are not that many, or one is not whole, or sharded.
    """
    if not Path(run).is_dir():
        raise InputError(f"run={run} is not a folder")
    found = list_checkpoints(run)
    if not found:
        raise InputError(f"run={run} has no folders checkpoint-N: name the output folder of a training")
    if not 2 <= number <= len(found):
        raise InputError(
            f"last={number} must be at least 2, and at most the {len(found)} checkpoints that {run} has "
            "(save_total_limit is how many a training keeps)"
        )
    for folder in found[-number:]:
        if is_sharded_checkpoint(folder):
            raise InputError(f"checkpoint {folder} is sharded, which cannot be averaged")
        check_checkpoint(folder)
    return found[-number:]


def average_checkpoints(folders: list[Path]) -> PreTrainedModel:
    """Average the weights of models of this package or of Transformers.

    Sums are in float64, results in the last model's dtype; what is not a floating-point number is the last model's. No
    more than two models are in memory at a time, and the sums.

    Args:
        folders: the models.

    Returns:
        The last of the models, with the mean of all of their weights.

    Raises:
        InputError: one cannot be loaded, or their weights differ in name or shape.
    """
    *others, last = folders
    model = _load(last)
    weights = model.state_dict()
    sums = {name: weight.double() for name, weight in weights.items() if weight.is_floating_point()}
    shapes = {name: total.shape for name, total in sums.items()}
    for folder in others:
        added = {name: weight for name, weight in _load(folder).state_dict().items() if weight.is_floating_point()}
        if {name: weight.shape for name, weight in added.items()} != shapes:
            raise InputError(f"checkpoint {folder} is of another model than {last}")
        for name, total in sums.items():
            total += added[name]
        del added  # before the next one is loaded
    for name, total in sums.items():
        weights[name].copy_(total / len(folders))
    check_finite(model)  # a dtype of 16 bits may overflow
    return model


def keep_training(run: str, folders: list[Path], output: Path) -> None:
    """Write into `output` what a model card tells of the training, and which checkpoints were averaged.

    Results of evaluations stay where they are: they are another model's.

    Args:
        run: the training's output folder.
        folders: the checkpoints.
        output: folder of the averaged model.
    """
    trained = [Path(run, name) for name in (CONFIG_FILE, HISTORY_FILE, "train_results.json")]
    for file in [*trained, folders[-1] / "trainer_state.json"]:
        if file.is_file():
            shutil.copy(file, output)
    (output / AVERAGED_FILE).write_text(json.dumps([folder.name for folder in folders]) + "\n", encoding="utf-8")


def _load(folder: Path) -> PreTrainedModel:
    is_translator = load_config(str(folder), argument="checkpoint").is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_translator else AutoModelForCausalLM
    return load_pretrained(auto_class, str(folder), argument="checkpoint")
