"""A trained model and its tokenizer, from a folder or a Hub name."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data.tokenizers import load_tokenizer
from .errors import InputError, first_line
from .families import FAMILIES, Family


def load_pretrained(auto_class, path: str, config_arguments: dict | None = None, **arguments) -> PreTrainedModel:
    """Load a model by `auto_class.from_pretrained`, with arguments of the configuration replaced.

    Args:
        auto_class (type): an Auto class of Transformers.
        path: folder or Hub name of the model.
        config_arguments: {argument of the configuration: value}.
        **arguments (Any): further arguments of `from_pretrained`.

    Raises:
        InputError: there is no such model, it is damaged, or its configuration does not allow the arguments.
    """
    try:
        config = AutoConfig.from_pretrained(path, **(config_arguments or {}))
        config.validate()
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
            raise ValueError(f"a classifier without a softmax over the vocabulary, {config.architectures[0]}")
        return auto_class.from_pretrained(path, config=config, **arguments)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"model_name_or_path={path}: cannot be loaded ({first_line(error)})") from error


def family_of(source: str) -> Family:
    """The family of a model.

    Args:
        source: folder or Hub name of the model.

    Raises:
        InputError: there is no configuration, or that of another family.
    """
    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise InputError(f"model={source}: cannot be loaded ({first_line(error)})") from error
    if model_type not in FAMILIES:
        raise InputError(f"model={source} has model_type={model_type!r}, expected one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def load_model_and_tokenizer(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of either family, with its softmax, and its tokenizer.

    Args:
        source: folder or Hub name of both.

    Raises:
        InputError: one of them cannot be loaded, or the model is of no family of this package.
    """
    family = family_of(source)
    tokenizer = load_tokenizer(source)
    return load_pretrained(family.auto_class, source), tokenizer
