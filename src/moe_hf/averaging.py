"""Averages the weights of the last checkpoints of a run into one model."""

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.distributed.checkpoint import is_sharded_checkpoint

from .errors import InputError
from .loading import check_finite, load_config, load_pretrained
from .run_folder import AVERAGED_FILE, CONFIG_FILE, HISTORY_FILE, check_checkpoint, list_checkpoints


def last_checkpoints(run: str, number: int) -> list[Path]:
    """Return the last checkpoints of a run, in order of their steps.

    Args:
        run: the run's output folder. It has at most `save_total_limit` checkpoints.
        number: number of checkpoints, at least 2.

    Raises:
        InputError: the folder does not exist or has too few checkpoints, or a checkpoint is incomplete or sharded.
    """
    if not Path(run).is_dir():
        raise InputError(f"run={run} is not a folder")
    found = list_checkpoints(run)
    if not found:
        raise InputError(f"run={run} has no checkpoint-N folders: name the output folder of a training")
    if not 2 <= number <= len(found):
        raise InputError(
            f"last={number} must be at least 2, and at most the {len(found)} checkpoints that {run} has "
            "(save_total_limit is how many a training keeps)"
        )
    for folder in found[-number:]:
        if is_sharded_checkpoint(folder):
            raise InputError(f"checkpoint {folder} is sharded, which cannot be averaged")
        check_checkpoint(folder, is_resumed=False)  # save_only_model leaves the states out
    return found[-number:]


def average_checkpoints(folders: list[Path]) -> PreTrainedModel:
    """Average the weights of models of this package or of Transformers.

    Sums are taken in float64, and the result has the last model's dtype. Tensors of integers are the last model's. At
    most two models and the sums are in memory at a time.

    Args:
        folders: the models.

    Returns:
        The last model, with the mean of the weights of all models.

    Raises:
        InputError: a model cannot be loaded, or the models' weights differ in name or shape.
    """
    *others, last = folders
    model = _load(last)
    weights = model.state_dict()
    sums = {name: weight.double() for name, weight in weights.items() if weight.is_floating_point()}
    shapes = {name: total.shape for name, total in sums.items()}
    for folder in others:
        added = {name: weight for name, weight in _load(folder).state_dict().items() if weight.is_floating_point()}
        if {name: weight.shape for name, weight in added.items()} != shapes:
            raise InputError(f"checkpoint {folder} belongs to another model than {last}")
        for name, total in sums.items():
            total += added[name]
        del added  # frees the memory before the next model is loaded
    for name, total in sums.items():
        weights[name].copy_(total / len(folders))
    check_finite(model)  # a dtype of 16 bits may overflow
    return model


def keep_training(run: str, folders: list[Path], output: Path) -> None:
    """Copy the training's records for a model card into `output`, and write which checkpoints were averaged.

    Evaluation results are not copied, because they belong to another model.

    Args:
        run: the training's output folder.
        folders: the checkpoints.
        output: the averaged model's folder.
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
