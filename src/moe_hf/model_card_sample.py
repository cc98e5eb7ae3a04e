"""A deterministic sample of a model's output for its card."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.lines import read_lines
from .data.paths import expand_file_patterns
from .data.translation_tokenizers import known_languages
from .errors import InputError
from .model_card_run import pair_sources
from .translator import Translator, generation_errors, on_one_line

PROMPT, SENTENCE = "The", "A sentence to translate."
PROMPT_WORDS, NEW_TOKENS, BEAMS = 3, 20, 4


@dataclass(frozen=True)
class Sample:
    """An input and the model's output for it.

    Attributes:
        input: the input, on one line.
        output: the output, on one line.
        search: the search that found the output.
        is_held_out: whether the input comes from validation data.
    """

    input: str
    output: str
    search: str
    is_held_out: bool


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: dict) -> Sample:
    """Let the model continue the first words of its validation text, or translate the first validation sentence.

    Args:
        model: a model of either family.
        tokenizer: the model's tokenizer.
        run: the arguments of the training. A fixed input replaces validation text that cannot be read.
    """
    if not model.config.is_encoder_decoder:
        line = _first_line(run.get("validation_files"))
        prompt = " ".join((line or PROMPT).split()[:PROMPT_WORDS])
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with generation_errors():
            ids = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=1, do_sample=False)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Sample(prompt, on_one_line(text), "greedy search", line is not None)
    files, language = run.get("validation_source_files"), None
    if pairs := pair_sources(run, "validation"):
        files, language = pairs[0].source_files, pairs[0].target_language
    line, known = _first_line(files), known_languages(tokenizer)
    language = language if language in known else next(iter(known), None)
    translator = Translator(model, tokenizer, language, num_beams=BEAMS, num_return_sequences=1, do_sample=False)
    [[translation]] = translator.translate([line or SENTENCE])
    into = f"{BEAMS} beams" if language is None else f"{BEAMS} beams, into {language}"
    return Sample(line or SENTENCE, on_one_line(translation.text), into, line is not None)


def _first_line(files: list[str] | str | None) -> str | None:
    """Return the first non-empty line of text files; None if the files cannot be read."""
    try:
        lines = (line for path in expand_file_patterns(files or []) for line in read_lines(path))
        return next((line.strip() for line in lines if line.strip()), None)
    except InputError:  # the model may have been trained on another machine
        return None
