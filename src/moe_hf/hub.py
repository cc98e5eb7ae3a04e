"""Writes and uploads Hub repositories: weights, tokenizer, generation settings, model card, and the model's code.

    with_code(model).push_to_hub("me/my-moe")     # a model in memory, or one that a Trainer saves
    export("runs/mine", "folder")                 # a training's output, written into a local folder
    push("runs/mine", "me/my-moe")                # a training's output, uploaded

Such a repository loads with `trust_remote_code=True`, without this package.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError
from .extra_packages import require_packages
from .families import FAMILIES
from .hub_errors import check_upload, naming_hub_errors
from .loading import family_of, load_model_and_tokenizer
from .model_card import write_model_card
from .model_code import add_code
from .run_folder import HISTORY_FILE
from .writing import check_new_folder, new_folder

# Files that one export of a model has and another may not have.
CHANGING_FILES = ["*.safetensors", "*.safetensors.index.json", "expert_history.png"]
# Dtypes that `save_weights` can store.
STORED_DTYPES = ("float32", "bfloat16", "float16")


def with_code(model: PreTrainedModel) -> PreTrainedModel:
    """Make `save_pretrained` and `push_to_hub` of this model write its code too, and return the model.

    The library stores this setting in the class, so it holds for every model of the class from then on.

    Raises:
        ValueError: the model does not belong to this package.
    """
    auto_classes = {"AutoModel": [family.base_class for family in FAMILIES.values()]}
    for family in FAMILIES.values():
        for auto_class, model_class in family.heads.items():
            auto_classes.setdefault(auto_class.__name__, []).append(model_class)
    names = {cls.__name__: auto_class for auto_class, classes in auto_classes.items() for cls in classes}
    # Compares names, not classes: a model loaded with trust_remote_code has its own copy of the class.
    if type(model).__name__ not in names:
        raise ValueError(f"model={type(model).__name__} must be one of {', '.join(sorted(names))}")
    type(model).register_for_auto_class(names[type(model).__name__])
    type(model.config).register_for_auto_class()
    model.config.auto_map = FAMILIES[model.config.model_type].auto_map
    return model


def export(
    source: str,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    max_shard_size: str = "5GB",
    stored_dtype: str | None = None,
    license: str = "apache-2.0",
    language: list[str] | None = None,
    data: str | None = None,
    argument: str = "folder",
) -> None:
    """Write a repository: safetensors, configurations, tokenizer, code, model card (README.md) and its plot.

    Args:
        source: a training's `output_dir`, or any folder or Hub name of a model and its tokenizer. The card has numbers
            only for a training's `output_dir`.
        folder: a new or empty folder.
        repo_id: the name that the card's example loads; by default the name of `folder`.
        max_shard_size: maximal size of a weights file; larger weights become several files.
        stored_dtype: dtype of the weights in the file, see `save_weights`; by default the model's.
        license: licence of the weights, by the Hub's name for it.
        language: codes of the languages, for the card; by default the languages of the training's sentence pairs.
        data: text for the card about the training data, such as their origin, licence and attribution.
        argument: the argument's name in error messages.

    Raises:
        InputError: `folder` is not empty or cannot be written, `source` cannot be loaded, or the package for the plot
            is missing, or the weights cannot be stored in `stored_dtype`.
    """
    check_new_folder(folder, argument)
    if Path(source, HISTORY_FILE).is_file():  # the card plots it
        require_packages("matplotlib")
    model, tokenizer = load_model_and_tokenizer(source)
    if stored_dtype is not None:
        round_weights(model, stored_dtype)  # first, because the card has a sample of the model's output
    repo_id = repo_id or Path(folder).name
    with new_folder(folder, argument) as inside:
        # The card comes first, because it refuses damaged records.
        texts = {"repo_id": repo_id, "license": license, "language": language, "data": data}
        write_model_card(model, tokenizer, source, inside, **texts)
        save_weights(model, inside, stored_dtype, max_shard_size=max_shard_size)
        add_code(inside)
        save_tokenizer(tokenizer, inside)


def round_weights(model: PreTrainedModel, dtype: str) -> None:
    """Round the weights of a model to a dtype. The model keeps its own dtype, and computes in it.

    Raises:
        InputError: a weight is quantized, or the dtype cannot hold it.
    """
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point():
            raise InputError(f"stored_dtype={dtype}: the weights {name} are quantized to {weight.dtype}")
        rounded = weight.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise InputError(f"stored_dtype={dtype}: the weights {name} exceed its largest number")
        weight.copy_(rounded)


def save_weights(model: PreTrainedModel, folder: Path, dtype: str | None = None, **options) -> None:
    """Call `save_pretrained`, with the weights stored in another dtype than the model's.

    The configuration keeps the model's dtype. Weights stored in bfloat16 take half the space of float32, and
    `from_pretrained` loads them as float32.

    Args:
        model: the model. Call `round_weights` first, so that the model in memory equals the stored one.
        folder: the folder to write into.
        dtype: one of `STORED_DTYPES`; by default the model's.
        **options (Any): further arguments of `save_pretrained`.
    """
    if dtype is not None:
        stored = {}  # one tensor for tied weights, which the library then writes once
        for name, weight in model.state_dict().items():
            place = (weight.data_ptr(), weight.shape)
            options.setdefault("state_dict", {})[name] = stored.setdefault(place, weight.to(getattr(torch, dtype)))
    model.save_pretrained(folder, **options)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer, without the library's note of the folder it was loaded from."""
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def push(source: str, repo_id: str, *, private: bool = False, **options) -> str:
    """Export a model and upload it; create the repository if it does not exist.

    Args:
        source: as for `export`.
        repo_id: the repository's name.
        private: whether a new repository is private.
        **options (Any): the other arguments of `export`.

    Returns:
        The address of the commit.

    Raises:
        InputError: `repo_id` is not a valid name, the Hub refuses the upload, or `export` raises it.
    """
    family_of(source)  # quick, so it comes before the request to the Hub
    check_upload(repo_id)
    with TemporaryDirectory() as folder:
        export(source, folder, repo_id=repo_id, **options)
        with naming_hub_errors("repo", repo_id):
            api = HfApi()
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=f"Upload {repo_id}",
                delete_patterns=CHANGING_FILES,  # an earlier upload may have had other shards
            )
    return commit.commit_url
