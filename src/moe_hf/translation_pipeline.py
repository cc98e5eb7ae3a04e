"""`moe_hf.pipeline("translation", ...)`, because Transformers 5 removed the translation pipeline."""

import inspect
from collections.abc import Sequence

import torch
import transformers
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.translation_tokenizers import load_translation_tokenizer
from .loading import check_vocabulary, load_pretrained
from .translator import Translator, move_to_device


class TranslationPipeline:
    """Translates texts, and returns results in the format of Transformers 4's translation pipeline.

    Args:
        model: a translation model.
        tokenizer: the model's tokenizer.
        target_language: language to translate into, for a multilingual model; `tgt_lang` is an alias.
        device: the device to move the model to, see `move_to_device`.
        **arguments (Any): as for `Translator`, such as `batch_size`, `max_length` or `num_beams`. GNMT's score
            (`length_alpha`) also needs `num_beams`. `src_lang` is accepted and ignored: the models read every language
            that they were trained on.

    Raises:
        TypeError: an argument is unknown to both `Translator` and `generate()`.
        ValueError: `target_language` and `tgt_lang` differ, or `Translator` or `move_to_device` raises it.
    """

    task = "translation"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_language: str | None = None,
        device: str | int | torch.device | None = None,
        **arguments,
    ):
        self.arguments = _translator_arguments(target_language, arguments)
        self.model, self.tokenizer = move_to_device(model, device), tokenizer

    def __call__(self, texts: str | Sequence[str], target_language: str | None = None, **arguments) -> list:
        """Translate one text, or each of several.

        Args:
            texts: the text or texts; an empty one gives an empty translation.
            target_language: replaces the pipeline's target language.
            **arguments (Any): replace the pipeline's arguments.

        Returns:
            For one text, [{"translation_text": ...}, ...] with `num_return_sequences` entries. For a list of texts, a
            list with one entry per text, or with a list of entries per text if `num_return_sequences` exceeds 1.
        """
        arguments = self.arguments | _translator_arguments(target_language, arguments)
        translator = Translator(self.model, self.tokenizer, **arguments)
        lines = [texts] if isinstance(texts, str) else list(texts)
        results = [[{"translation_text": one.text} for one in found] for found in translator.translate(lines)]
        if isinstance(texts, str):
            return results[0]
        return [found[0] for found in results] if translator.num_results == 1 else results


def _translator_arguments(target_language: str | None, arguments: dict) -> dict:
    """Return the arguments under the names of `Translator`, with the target language if given."""
    arguments = {name: value for name, value in arguments.items() if name != "src_lang"}
    tgt_lang = arguments.pop("tgt_lang", None)
    if None not in (target_language, tgt_lang) and target_language != tgt_lang:
        raise ValueError(
            f"target_language={target_language!r} and tgt_lang={tgt_lang!r} differ, give only one of them"
        )
    known = {*inspect.signature(Translator).parameters, *inspect.signature(GenerationMixin.generate).parameters}
    if unknown := sorted(arguments.keys() - known - vars(GenerationConfig()).keys()):
        raise TypeError(f"the translation pipeline got unexpected arguments: {', '.join(unknown)}")
    language = target_language or tgt_lang
    return arguments if language is None else arguments | {"target_language": language}


def pipeline(task: str, model=None, tokenizer=None, **arguments):
    """Call `transformers.pipeline`, or make a `TranslationPipeline` for "translation" and "translation_xx_to_yy".

    Args:
        task: "translation", or a task of `transformers.pipeline`.
        model (PreTrainedModel | str | None): the model, or its folder or Hub name.
        tokenizer (PreTrainedTokenizerBase | str | None): the tokenizer, or its folder or Hub name; by default the
            tokenizer in the model's folder.
        **arguments (Any): arguments of `TranslationPipeline`, or of `transformers.pipeline`. `dtype` (in older code
            `torch_dtype`) is for a model given by name; by default, the dtype in which the model was saved.

    Raises:
        ValueError: the model or the tokenizer is missing, a loaded model has a `dtype`, or `TranslationPipeline`
            raises it.
    """
    if not task.startswith("translation"):
        return transformers.pipeline(task, model=model, tokenizer=tokenizer, **arguments)
    if model is None:
        raise ValueError("model=None: give a translation model, or its folder or Hub name")
    tokenizer = tokenizer or (model if isinstance(model, str) else model.name_or_path)
    if not tokenizer:
        raise ValueError("tokenizer=None: the model was not loaded from a folder or the Hub, so give its tokenizer")
    older, dtype = arguments.pop("torch_dtype", None), arguments.pop("dtype", None)
    dtype = older if dtype is None else dtype
    if isinstance(model, str):
        dtype = "auto" if dtype is None else dtype
        model = load_pretrained(AutoModelForSeq2SeqLM, model, argument="model", dtype=dtype)
    elif dtype not in (None, "auto"):
        raise ValueError(f"dtype={dtype} is only for a model given by name; call model.to({dtype}) instead")
    if isinstance(tokenizer, str):
        tokenizer = load_translation_tokenizer(tokenizer, argument="tokenizer")
        check_vocabulary(tokenizer, model.config, f"tokenizer={tokenizer.name_or_path}")
    if task.startswith("translation_") and "_to_" in task and getattr(tokenizer, "extra_special_tokens", None):
        if not {"target_language", "tgt_lang"} & arguments.keys():
            arguments["target_language"] = task.rpartition("_to_")[2]
    return TranslationPipeline(model, tokenizer, **arguments)
