"""Translates many lines with a trained model: batches lines of similar length, and returns results in input order."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from .data.translation_tokenizers import encode_sources
from .errors import InputError, first_line
from .generation import gnmt_beam_search
from .value_checks import LENGTH_EXPONENT, LENGTH_WEIGHT, MOST_BEAMS, check_range, shown, typed

NUM_BEAMS = 4  # default of the commands and of evaluate_translation
# Types of the generate() arguments that this module computes with.
GENERATE_TYPES = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), int),
    **dict.fromkeys(("max_new_tokens", "max_length"), int | None),
    "length_penalty": float | None,
}


def _portions(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of `size` lines; if a line cannot be read, yield the lines before it, then raise the error."""
    portion = []
    try:
        for line in lines:
            portion.append(line)
            if len(portion) == size:
                yield portion
                portion = []
    except InputError:
        if portion:
            yield portion
        raise
    if portion:
        yield portion


@dataclass(frozen=True)
class Translation:
    """One translation of a line.

    Attributes:
        text: the translation, without special tokens.
        score: for beam search, the score that ranks the hypotheses. For greedy search, the log-probability. For
            sampling, the log-probability after temperature and top-k. 0 for an empty line; None if not requested.
        source_ids: tokens of the line.
        target_ids: tokens of the translation, without the start token and everything after the end token.
    """

    text: str
    score: float | None
    source_ids: list[int]
    target_ids: list[int]


def on_one_line(text: str) -> str:
    """Return the text with a space for every line break: a model trained on text with line breaks may write some."""
    return re.sub(r"\r\n|[\r\n]", " ", text)


def move_to_device(model: PreTrainedModel, device: str | int | torch.device | None = None) -> PreTrainedModel:
    """Move a model to a device, as `transformers.pipeline` does.

    Args:
        device: the device; -1 is the CPU. None: an accelerator if present, but a model that is already spread over
            devices does not move.

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    if device is None:
        if getattr(model, "hf_device_map", None):
            return model
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return model.to("cpu" if device == -1 else device)
    except (RuntimeError, AssertionError, ValueError) as error:  # from torch or the library
        raise InputError(f"device={device!r} cannot be used ({str(error).partition(chr(10))[0]})") from error


@contextmanager
def generation_errors() -> Iterator[None]:
    """Turn a ValueError of generate() into an error that names the source of the refused setting.

    Raises:
        InputError: generate() raised a ValueError.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"generate() refuses an argument, or a setting in the model's generation_config.json ({first_line(error)})"
        ) from error


class LengthLimits(StoppingCriteria):
    """Ends each translation at its own maximal length, so that endless translations do not depend on the batch.

    Args:
        limits: maximal number of new tokens for each source; rows of the same source are adjacent.
    """

    def __init__(self, limits: list[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        limits = self.limits.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.limits))
        return input_ids.shape[1] - 1 >= limits  # the first token is the decoder's start


class ChosenLogProbs(LogitsProcessor):
    """Records the log-probability of each token that greedy search or sampling chooses; changes no scores.

    The library's `output_scores` would keep the scores of the whole vocabulary in all steps: 1 GB for 8000 tokens with
    a vocabulary of 32,000.
    """

    def __init__(self):
        self._chosen: list[torch.Tensor] = []
        self._step: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self._step = scores.log_softmax(dim=-1)
        return scores

    def sums(self, sequences: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Return (rows,), the sums over the first `lengths` (rows,) new tokens of the `sequences` from generate()."""
        self._take(sequences)
        steps = torch.cat(self._chosen, dim=1)
        is_after = torch.arange(steps.shape[1], device=steps.device) >= lengths[:, None]
        return steps.masked_fill(is_after, 0).sum(dim=1)

    def _take(self, sequences: torch.LongTensor) -> None:
        if self._step is not None:
            self._chosen.append(self._step.gather(1, sequences[:, -1:]))


class Translator:
    """Translates lines with `model.generate`.

    A translation never contains special tokens, such as padding or a language tag, even if the model gives them a high
    probability. `suppress_tokens`, given here or in the model's generation configuration, replaces this rule.

    Args:
        model: an encoder-decoder model; it is put into evaluation mode.
        tokenizer: the model's tokenizer.
        target_language: language to translate into, for a multilingual model.
        tokens_per_batch: maximal number of positions in a batch: padded source length times sources times beams.
            None: 8000.
        batch_size: maximal number of sources in a batch; None: as many as fit into `tokens_per_batch`.
        buffer_lines: number of lines read before the first is translated. More lines give batches with less padding.
        max_length_ratio: a translation ends at this multiple of the source's tokens plus ten. It overrides the length
            in the model's generation configuration. `max_length` and `max_new_tokens`, given here, can only shorten
            it.
        length_alpha: alpha of GNMT's score, see `gnmt_beam_search`. If both `length_alpha` and `coverage_beta` are
            None, Transformers' score is used.
        coverage_beta: beta of GNMT's score.
        with_scores: whether translations have a score. With Transformers' beam search, scores need memory for the
            logits of all steps, about 4 * tokens_per_batch * vocabulary bytes. Other searches need no extra memory.
        **generate_arguments (Any): for `model.generate`, such as num_beams, num_return_sequences, do_sample. The
            defaults are in the model's generation configuration, where num_beams is usually 1 (greedy search).
            `moe-hf translate` and `evaluate_translation` search with `NUM_BEAMS` = 4 beams by default.

    Raises:
        InputError: a number is out of range, or GNMT's score is combined with a single beam or another length penalty.
            The translation raises it if `target_language` is unknown to the tokenizer, or missing for a multilingual
            one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_language: str | None = None,
        *,
        tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        buffer_lines: int = 2000,
        max_length_ratio: float = 3.0,
        length_alpha: float | None = None,
        coverage_beta: float | None = None,
        with_scores: bool = False,
        **generate_arguments,
    ):
        self.model, self.tokenizer, self.target_language = model.eval(), tokenizer, target_language
        if "batch_tokens" in generate_arguments:
            tokens_per_batch = self._take_old_name(generate_arguments, tokens_per_batch)
        generate_arguments = {
            name: typed(name, value, GENERATE_TYPES[name]) if name in GENERATE_TYPES else value
            for name, value in generate_arguments.items()
        }
        tokens_per_batch = typed("tokens_per_batch", tokens_per_batch, int | None)
        batch_size, buffer_lines = (
            typed("batch_size", batch_size, int | None),
            typed("buffer_lines", buffer_lines, int),
        )
        max_length_ratio = typed("max_length_ratio", max_length_ratio, float)
        self.tokens_per_batch = 8000 if tokens_per_batch is None else tokens_per_batch
        self.buffer_lines, self.max_length_ratio = buffer_lines, max_length_ratio
        self.with_scores, self.generate_arguments = with_scores, dict(generate_arguments)
        self.batch_size = math.inf if batch_size is None else batch_size
        self.max_new_tokens = self._take_max_new_tokens()
        self.num_beams, self.num_results = self._setting("num_beams", 1), self._setting("num_return_sequences", 1)
        self._check_numbers()
        gnmt = {"length_alpha": length_alpha, "coverage_beta": coverage_beta}
        if gnmt := {name: typed(name, value, float) for name, value in gnmt.items() if value is not None}:
            self._check_gnmt(gnmt)
            self.generate_arguments |= {"length_alpha": 0.0, "coverage_beta": 0.0} | gnmt
            self.generate_arguments["custom_generate"] = gnmt_beam_search
            self._give_attention()

    @staticmethod
    def _take_old_name(generate_arguments: dict, tokens_per_batch: int | None) -> int:
        """Return the value of `batch_tokens`, the old name of `tokens_per_batch`."""
        message = "batch_tokens of Translator is now called tokens_per_batch"
        if tokens_per_batch is not None:
            raise InputError(f"{message}; give only tokens_per_batch={tokens_per_batch}")
        warnings.warn(f"{message}; the next release removes the old name", DeprecationWarning, stacklevel=3)
        return generate_arguments.pop("batch_tokens")

    def _setting(self, name: str, default=None):
        """Return the value that generate() will use: an argument, or a value of a generation configuration."""
        configs = (self.generate_arguments.get("generation_config"), self.model.generation_config)
        values = [self.generate_arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), default)

    def _take_max_new_tokens(self) -> float:
        """Return the limit from `max_new_tokens` and `max_length`; `max_length` also counts the start token."""
        new, length = (self.generate_arguments.pop(name, None) for name in ("max_new_tokens", "max_length"))
        for name, value, least in (("max_new_tokens", new, 1), ("max_length", length, 2)):
            if value is not None and value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        return min(math.inf if new is None else new, math.inf if length is None else length - 1)

    def _length_arguments(self, new_tokens: int) -> dict[str, int]:
        """Return arguments of generate() that allow `new_tokens`, under one name: generate() warns about two."""
        if self._setting("max_new_tokens") is None:
            return {"max_length": new_tokens + 1}
        return {"max_new_tokens": new_tokens}

    def _check_numbers(self) -> None:
        for name in ("tokens_per_batch", "batch_size", "buffer_lines", "num_beams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_beams > MOST_BEAMS:
            raise InputError(f"num_beams={self.num_beams} must be at most {MOST_BEAMS}")
        if self.num_results < 1:
            raise InputError(f"num_return_sequences={self.num_results} must be at least 1")
        if self.num_results > self.num_beams and not (self._setting("do_sample") and self.num_beams == 1):
            raise InputError(f"num_return_sequences={self.num_results} exceeds num_beams={self.num_beams}")
        _check_not_negative("max_length_ratio", self.max_length_ratio)
        check_range("length_penalty", self._setting("length_penalty"), LENGTH_EXPONENT)

    def _check_gnmt(self, weights: dict[str, float]) -> None:
        for name, value in weights.items():
            check_range(name, value, LENGTH_WEIGHT)
            if self.num_beams < 2:
                raise InputError(f"{name}={value} needs num_beams of at least 2, got {self.num_beams}")
            penalty, sampling = self.generate_arguments.get("length_penalty"), self._setting("do_sample") or None
            for other, given in (("length_penalty", penalty), ("do_sample", sampling)):
                if given is not None:
                    raise InputError(f"{other}={given} is not for GNMT's score, which {name}={value} asks for")

    def translate(self, lines: Iterable[str]) -> Iterator[list[Translation]]:
        """Translate lines one after the other.

        Args:
            lines: the texts; an empty line gives empty translations.

        Yields:
            The translations of each line, as many as `num_return_sequences`, best first.
        """
        if isinstance(lines, str):  # its letters would be taken for lines
            raise InputError(f"lines={shown(lines)} is one text, give a list of texts")
        if self.model.device.type == "meta":
            raise InputError("device='meta' has no values and cannot translate: use cpu or an accelerator")
        encode_sources(self.tokenizer, [], self.target_language)  # refuses a wrong language, even without lines
        empty = Translation("", 0.0 if self.with_scores else None, [], [])
        for chunk in _portions(lines, self.buffer_lines):
            for line in chunk:
                if not isinstance(line, str):
                    raise InputError(f"lines: {shown(line)} is not text")
            full = [number for number, line in enumerate(chunk) if line.strip()]
            encoded = encode_sources(self.tokenizer, [chunk[number] for number in full], self.target_language)
            results = dict(zip(full, self.translate_ids(encoded)))
            for number in range(len(chunk)):
                yield results.get(number) or [empty] * self.num_results

    def translate_ids(
        self, encoded: Sequence[Sequence[int]], on_batch: Callable[[int], None] = lambda number: None
    ) -> list[list[Translation]]:
        """Return the translations of encoded sources, in input order.

        Args:
            encoded: token ids from `encode_sources`.
            on_batch: called after each batch with its number of sources, to show progress.
        """
        results: list[list[Translation]] = [[] for _ in encoded]
        for batch in self._batches([len(ids) for ids in encoded]):
            for number, translations in zip(batch, self._translate_batch([list(encoded[i]) for i in batch])):
                results[number] = translations
            on_batch(len(batch))
        return results

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Yield batches of source indices, longest sources first, of at most `tokens_per_batch` positions."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        beams = max(self.num_beams, self.num_results)
        start = 0
        while start < len(order):
            size = min(max(1, self.tokens_per_batch // (lengths[order[start]] * beams)), self.batch_size)
            yield order[start : start + size]
            start += size

    @torch.no_grad()
    def _translate_batch(self, sources: list[list[int]]) -> list[list[Translation]]:
        inputs = self.tokenizer.pad({"input_ids": sources}, return_tensors="pt", padding_side="right")
        positions = getattr(self.model.config, "max_position_embeddings", math.inf)  # limited in a Transformer
        longest = min(positions, self.max_new_tokens)
        limits = [min(int(self.max_length_ratio * len(ids)) + 10, longest) for ids in sources]
        log_probs = ChosenLogProbs() if self.with_scores and self.num_beams == 1 else None
        with generation_errors():
            outputs = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                **(self.generate_arguments | self._length_arguments(max(limits))),
                logits_processor=self._logits_processors(log_probs),
                stopping_criteria=StoppingCriteriaList([LengthLimits(limits)]),
                return_dict_in_generate=True,
                # The library's beam search returns the translations' scores only with the scores of all steps.
                output_scores=self.with_scores
                and self.num_beams > 1
                and "custom_generate" not in self.generate_arguments,
            )
        sequences = outputs.sequences[:, 1:]
        ends = (sequences == self.tokenizer.eos_token_id) | (sequences == self.tokenizer.pad_token_id)
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), sequences.shape[1])
        limits = torch.tensor(limits, device=lengths.device).repeat_interleave(self.num_results)
        kept = lengths + (lengths < limits)  # includes the end token, which a truncated translation lacks
        scores = [None] * len(sequences)
        if log_probs is not None:
            scores = log_probs.sums(outputs.sequences, kept).tolist()
        elif self.with_scores:
            scores = outputs.sequences_scores.tolist()
        translations = []
        for row, ids in enumerate(sequences.tolist()):
            text = self.tokenizer.decode(ids[: lengths[row]], skip_special_tokens=True)
            source = sources[row // self.num_results]
            translations.append(Translation(text, scores[row], source, ids[: kept[row]]))
        return [translations[i : i + self.num_results] for i in range(0, len(translations), self.num_results)]

    def _logits_processors(self, log_probs: ChosenLogProbs | None) -> LogitsProcessorList:
        """Return the processor that records scores, then the processor that suppresses special tokens."""
        processors = LogitsProcessorList([] if log_probs is None else [log_probs])
        if self._setting("suppress_tokens") is None:
            names = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
            wanted = {self.tokenizer.eos_token_id, *(one for name in names for one in _as_list(self._setting(name)))}
            if special := sorted(set(self.tokenizer.all_special_ids) - wanted):
                processors.append(SuppressTokensLogitsProcessor(special, device=self.model.device))
        return processors

    def _give_attention(self) -> None:
        """Switch a Transformer to eager attention, the only implementation that returns attention weights."""
        if getattr(self.model.config, "_attn_implementation", None) not in (None, "eager"):
            self.model.set_attn_implementation("eager")

    @torch.no_grad()
    def attention(self, translation: Translation) -> torch.Tensor:
        """Return the decoder's attention (target tokens, source tokens) for each token of a translation."""
        self._give_attention()
        device = self.model.device
        outputs = self.model(
            input_ids=torch.tensor([translation.source_ids], device=device),
            labels=torch.tensor([translation.target_ids], device=device),
            output_attentions=True,
        )
        return outputs.cross_attentions[-1][0].mean(dim=0)


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{name}={value} must be a number of at least 0")


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
