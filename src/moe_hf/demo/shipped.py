"""The first part of the demo: sentences translated by the model in model_cards/, without any training."""

import logging
import time

from ..families import TRANSLATION_MODELS
from ..loading import load_model_and_tokenizer
from ..translator import Translator

logger = logging.getLogger(__name__)

# {(source language, target language): sentences}
SENTENCES = {
    ("en", "de"): ["Where is the station?", "I missed the last train yesterday."],
    ("en", "fr"): ["Where is the nearest station?", "I would like a cup of coffee, please."],
    ("de", "en"): ["Ich habe gestern meinen Schlüssel verloren.", "Warum hast du mir nichts gesagt?"],
    ("fr", "en"): ["Il pleut depuis ce matin.", "Elle ne veut pas nous dire la vérité."],
}


def run_shipped_demo(folder: str) -> dict[tuple[str, str], list[str]]:
    """Load a translator of several directions, log its size, and translate `SENTENCES` with four beams.

    Args:
        folder: the model's folder.

    Returns:
        {(source language, target language): translations}.
    """
    logger.info(f"== A trained translator, {folder}: between English and German, and English and French")
    model, tokenizer = load_model_and_tokenizer(folder, TRANSLATION_MODELS)
    config = model.config
    logger.info(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {config.num_experts} experts in each MoE layer, "
        f"{config.num_experts_per_tok} for a token"
    )
    start, translations = time.time(), {}
    for (source, target), lines in SENTENCES.items():
        translator = Translator(model, tokenizer, target, num_beams=4)
        translations[source, target] = [found[0].text for found in translator.translate(lines)]
        for line, text in zip(lines, translations[source, target]):
            logger.info(f"  {source}-{target}: {line} -> {text}")
    logger.info(f"{sum(map(len, translations.values()))} sentences in {time.time() - start:.1f} s")
    return translations
