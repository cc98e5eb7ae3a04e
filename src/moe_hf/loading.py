"""Loads a model and its tokenizer from a folder or the Hub, and refuses damaged or mismatched files.

Code in a folder or repository is never run: `trust_remote_code` is always False.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from .data.tokenizers import load_tokenizer
from .data.translation_tokenizers import load_translation_tokenizer
from .errors import InputError, first_line
from .families import FAMILIES, TRANSLATION_MODELS, Family
from .model_files import MODEL_FILES, check_files, check_weight_files
from .models.finite import first_non_finite

# The size of a padded vocabulary is a multiple of one of these numbers.
PADDED_TO = (8, 16, 32, 64, 128, 256, 512)
KINDS = {False: "language model", True: "translation model"}


class WeightsError(InputError):
    """Weights are missing, unexpected or not finite; the message does not name the file."""


def load_config(
    path: str, auto_class: type | None = None, *, argument: str = "model_name_or_path", **changes
) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        path: folder or Hub name of the model.
        auto_class: an Auto class of Transformers that must be able to load the model.
        argument: the argument's name in error messages.
        **changes (Any): new values for arguments of the configuration.

    Raises:
        InputError: the configuration is missing or damaged, needs code of the repository, or refuses the changes, or
            the model is of another kind.
    """
    try:
        check_files(path, MODEL_FILES)
        if Path(path).is_dir() and not Path(path, "config.json").exists():
            raise ValueError(f"the folder has no config.json{_instead(path)}")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
        if hasattr(config, "validate"):
            config.validate()
        if "/" in str(getattr(config, "_attn_implementation", None)):
            raise ValueError(f"attn_implementation={config._attn_implementation!r} needs code, which is not run here")
        family = FAMILIES.get(config.model_type)
        if family and config.is_encoder_decoder != (family is TRANSLATION_MODELS):
            raise ValueError(f"is_encoder_decoder={config.is_encoder_decoder} in config.json is not for this model")
    except Exception as error:  # the library raises many kinds of errors on damaged files
        raise _cannot_be_loaded(path, argument, error) from error
    _check_kind(config, auto_class, path, argument)
    return config


def load_pretrained(
    auto_class,
    path: str,
    config_arguments: dict | None = None,
    *,
    argument: str = "model_name_or_path",
    **arguments,
) -> PreTrainedModel:
    """Load a model with `auto_class.from_pretrained`, with new values for arguments of the configuration.

    Args:
        auto_class (type): an Auto class of Transformers.
        path: folder or Hub name of the model.
        config_arguments: {argument of the configuration: value}.
        argument: the argument's name in error messages.
        **arguments (Any): further arguments of `from_pretrained`.

    Raises:
        InputError: the model does not exist, is of another kind, or does not allow the arguments, or its weights are
            damaged, missing, unexpected, of another shape, or not finite.
    """
    config = load_config(path, auto_class, argument=argument, **(config_arguments or {}))
    try:
        check_weight_files(path)
        if any(name.endswith("ForSequenceClassification") for name in _architectures(config)):
            raise ValueError(f"a classifier without a softmax over the vocabulary, {config.architectures[0]}")
        if Path(path, "adapter_config.json").exists() and not is_peft_available():
            raise ValueError("adapter_config.json: install the package peft, or merge the adapter into the weights")
        with _without_loading_report():
            model, found = auto_class.from_pretrained(
                path,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_found` reports both shapes
                **arguments,
            )
        _check_found(found, model, config_arguments or {})
        check_finite(model)
        _check_generation(model)
    except Exception as error:
        raise _cannot_be_loaded(path, argument, error) from error
    return model


def load_model_and_tokenizer(
    source: str, family: Family | None = None, *, argument: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its softmax, and its tokenizer.

    Args:
        source: folder or Hub name of the model and the tokenizer.
        family: the kind of model required, from this package or from Transformers. None: a model of this package, of
            either family.
        argument: the argument's name in error messages.

    Raises:
        InputError: the model or the tokenizer cannot be loaded, they do not fit each other, or the model is of another
            kind.
    """
    if family is None:
        family = family_of(source, argument)
    else:
        load_config(source, family.auto_class, argument=argument)
    load = load_translation_tokenizer if family is TRANSLATION_MODELS else load_tokenizer
    tokenizer = load(source, argument=argument)
    model = load_pretrained(family.auto_class, source, argument=argument)
    check_pair(tokenizer, model.config, f"{argument}={source}")
    return model, tokenizer


def family_of(source: str, argument: str = "model") -> Family:
    """Return the family of a model.

    Args:
        source: folder or Hub name of the model.
        argument: the argument's name in error messages.

    Raises:
        InputError: the configuration is missing, or names another kind of model.
    """
    model_type = load_config(source, argument=argument).model_type
    if model_type not in FAMILIES:
        raise InputError(f"{argument}={source} has model_type={model_type!r}, expected one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, given: str) -> None:
    """Check that a tokenizer fits a model's vocabulary.

    The model's vocabulary may be padded by up to 7 tokens, or to a multiple of a number in `PADDED_TO`.

    Args:
        tokenizer: the tokenizer to use with the model.
        config: the model's configuration.
        given: the source of the tokenizer, as the user typed it.

    Raises:
        InputError: the tokenizer has more tokens than the model, or so few that another tokenizer must have been used.
    """
    size, vocab_size = max(len(tokenizer), *(token + 1 for token in tokenizer.get_vocab().values())), config.vocab_size
    if size > vocab_size:
        raise InputError(f"{given}: the tokenizer has {size} tokens, more than vocab_size={vocab_size} of the model")
    unused = vocab_size - size
    if unused >= PADDED_TO[0] and not any(vocab_size % n == 0 and unused < n for n in PADDED_TO):
        raise InputError(
            f"{given}: the tokenizer has {size} tokens, fewer than vocab_size={vocab_size} of the model, which was "
            "trained with another one"
        )


def check_pair(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, given: str) -> None:
    """Check that a tokenizer is the one a model was trained with.

    The check compares the vocabulary and, for models of this package, the special tokens.

    Args:
        tokenizer: as for `check_vocabulary`.
        config: as for `check_vocabulary`.
        given: as for `check_vocabulary`.

    Raises:
        InputError: the model was trained with another tokenizer.
    """
    check_vocabulary(tokenizer, config, given)
    if config.model_type not in FAMILIES:
        return  # special tokens of some published models differ from their tokenizer's
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        of_model, of_tokenizer = getattr(config, name), getattr(tokenizer, name)
        allowed = of_model if isinstance(of_model, list) else [of_model]
        if None not in (of_model, of_tokenizer) and of_tokenizer not in allowed:
            raise InputError(
                f"{given}: the tokenizer has {name}={of_tokenizer}, but config.json of the model {name}={of_model}: "
                "it was trained with another tokenizer"
            )


def check_finite(model: PreTrainedModel) -> None:
    """Check that no weight of a model is NaN or infinite.

    Args:
        model: any model, which may be quantized or spread over devices.

    Raises:
        WeightsError: a weight is not finite; the message names the tensor.
    """
    # 8-bit weights are integers, so the check reads their scale.
    weights = ((name, getattr(weight, "scale", weight)) for name, weight in model.named_parameters())
    if name := first_non_finite(weights):
        raise WeightsError(
            f"the weights {name} are not finite (NaN or infinite): use an earlier checkpoint, or train again"
        )


def check_keys(missing: set[str], unexpected: set[str]) -> None:
    """Refuse a checkpoint whose weights differ from the model's.

    Args:
        missing: names of the model's weights that the checkpoint lacks.
        unexpected: names of the checkpoint's weights that the model lacks.

    Raises:
        WeightsError: a weight is missing or unexpected.
    """
    if missing:
        raise WeightsError(f"the weights lack {_some(missing)}, which would be initialised at random")
    if unexpected:
        raise WeightsError(f"the weights have {_some(unexpected)}, which the model of config.json does not have")


def _architectures(config: PreTrainedConfig) -> list[str]:
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures={names!r} in config.json is not a list of names")
    return names


def _check_kind(config: PreTrainedConfig, auto_class: type | None, path: str, argument: str) -> None:
    """Refuse a translation model where a language model is needed, and vice versa, with a clear message."""
    wanted = [family is TRANSLATION_MODELS for family in FAMILIES.values() if family.auto_class is auto_class]
    if wanted and config.is_encoder_decoder != wanted[0]:
        raise InputError(
            f"{argument}={path} is a {KINDS[not wanted[0]]} (model_type={config.model_type!r}), "
            f"expected a {KINDS[wanted[0]]}"
        )


def _check_found(found: dict, model: PreTrainedModel, changes: dict) -> None:
    """Refuse weights that the library would initialise at random or ignore; `found` is its loading info.

    The weights of the gating noise are an exception if `changes` sets another gating. They then start at zero or are
    unused.
    """

    def is_noise(name: str) -> bool:
        return name.endswith(".noise_weight")

    has_noise = getattr(model.config, "gating", "noisy_top_k") == "noisy_top_k"
    missing = {name for name in found["missing_keys"] if not ("gating" in changes and is_noise(name))}
    unexpected = {name for name in found["unexpected_keys"] if has_noise or not is_noise(name)}
    if found["mismatched_keys"]:
        name, shape, expected = min(found["mismatched_keys"])
        raise ValueError(f"the weights {name} have the shape {tuple(shape)}, but by config.json {tuple(expected)}")
    check_keys(missing, unexpected)


def _instead(path: str) -> str:
    """Return advice for the folder of an unfinished run."""
    names = [file.parent.name for file in Path(path).glob("checkpoint-*/config.json")]
    return f", but checkpoints: name {Path(path, max(names, key=lambda name: (len(name), name)))}" if names else ""


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _check_generation(model: PreTrainedModel) -> None:
    """Refuse values in the generation configuration of a model of this package that generate() cannot use."""
    settings = getattr(model, "generation_config", None)
    if settings is None or model.config.model_type not in FAMILIES:
        return
    for name in ("num_beams", "num_return_sequences", "max_length", "max_new_tokens"):
        value = getattr(settings, name, None)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r} in generation_config.json must be a whole number of at least 1")
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    for name in (*names, "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        value = getattr(settings, name, None)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and (type(one) is not int or not 0 <= one < model.config.vocab_size):
                raise ValueError(f"{name}={value!r} in generation_config.json is not below {model.config.vocab_size}")


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Suppress the library's table of missing weights, which an error of this module replaces."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _cannot_be_loaded(path: str, argument: str, error: Exception) -> InputError:
    reason = first_line(error) or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it needs code of its own (auto_map in config.json), which is not run here"
    elif isinstance(error, UnpicklingError):  # torch's message advises to run the code
        reason = "pytorch_model.bin is damaged, or has code in it, which is not run here"
    elif isinstance(error, OSError) and not Path(path).exists():
        reason = f"there is no such folder; as a Hub name: {reason}"
    elif isinstance(error, LookupError | AttributeError | TypeError):  # the message is a name from the library's code
        reason = (
            f"a value in config.json or generation_config.json has the wrong type, {type(error).__name__}: {reason}"
        )
    return InputError(f"{argument}={path}: cannot be loaded ({reason})")
