"""`moe_hf.pipeline("translation", ...)`: Transformers 5 has no translation pipeline and refuses the name."""

from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from .training.translation_tokenizers import load_translation_tokenizer
from .translation import Translator, move_to_device


class TranslationPipeline:
    """Translates texts; the results are those of Transformers 4's translation pipeline.

    Args:
        model, tokenizer: of a translation model.
        target_language: of a multilingual model: the language to translate into.
        device: where to, see `move_to_device`.
        arguments: as for `Translator`; GNMT's score, `length_alpha`, needs `num_beams` as well.
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
        self.model, self.tokenizer = move_to_device(model, device), tokenizer
        self.target_language, self.arguments = target_language, arguments

    def __call__(self, texts: str | Sequence[str], target_language: str | None = None, **arguments) -> list:
        """Translate one text, or each of several.

        Args:
            texts: the text or texts; an empty one gives an empty translation.
            target_language, arguments: in place of those that the pipeline was made with.

        Returns:
            [{"translation_text": ...}, ...] with `num_return_sequences` entries for one text, a list of these entries,
            or of lists of them when there are several for each text, for a list of texts.
        """
        translator = Translator(
            self.model, self.tokenizer, target_language or self.target_language, **(self.arguments | arguments)
        )
        lines = [texts] if isinstance(texts, str) else list(texts)
        results = [[{"translation_text": one.text} for one in found] for found in translator.translate(lines)]
        if isinstance(texts, str):
            return results[0]
        return [found[0] for found in results] if translator.num_results == 1 else results


def pipeline(task: str, model=None, tokenizer=None, **arguments):
    """`transformers.pipeline`, and "translation" or "translation_xx_to_yy" for the models of this package.

    Args:
        task: "translation", or a task of Transformers'.
        model, tokenizer: objects, or a folder or Hub name; the tokenizer is by default that beside the model.
        arguments: of `TranslationPipeline`, or of `transformers.pipeline`.
    """
    if not task.startswith("translation"):
        return transformers.pipeline(task, model=model, tokenizer=tokenizer, **arguments)
    if model is None:
        raise ValueError("model=None: a translation model is needed, or its folder or Hub name")
    tokenizer = tokenizer or (model if isinstance(model, str) else model.name_or_path)
    if not tokenizer:
        raise ValueError("tokenizer=None: this model was not loaded from anywhere, give the model's tokenizer")
    if isinstance(model, str):
        model = AutoModelForSeq2SeqLM.from_pretrained(model)
    if isinstance(tokenizer, str):
        tokenizer = load_translation_tokenizer(tokenizer)
    if task.startswith("translation_") and "_to_" in task and getattr(tokenizer, "extra_special_tokens", None):
        arguments.setdefault("target_language", task.rpartition("_to_")[2])
    return TranslationPipeline(model, tokenizer, **arguments)
