"""Translate many lines with a trained model: batches by length inside, results in the order of the lines."""

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

# Of the arguments of generate() that this module computes with.
GENERATE_TYPES = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), int),
    **dict.fromkeys(("max_new_tokens", "max_length"), int | None),
    "length_penalty": float | None,
}


def _portions(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` lines; if one cannot be read, those before it come first, and then the error."""
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
        text: without special tokens.
        score: what a beam search ranks by; for greedy search the log probability; for sampling that under the
            distribution drawn from, after temperature and top-k; 0 for an empty line; None unless asked for.
        source_ids: tokens of the line.
        target_ids: tokens of the translation, without the start and what follows its end.
    """

    text: str
    score: float | None
    source_ids: list[int]
    target_ids: list[int]


def on_one_line(text: str) -> str:
    """The text with a space for every line break, of which a model that has learnt from such text may write some."""
    return re.sub(r"\r\n|[\r\n]", " ", text)


def move_to_device(model: PreTrainedModel, device: str | int | torch.device | None = None) -> PreTrainedModel:
    """Put a model on a device, as `transformers.pipeline` does.

    Args:
        device: None: an accelerator if there is one, but a model that is spread over devices already stays there;
            -1: the CPU.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        if getattr(model, "hf_device_map", None):
            return model
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return model.to("cpu" if device == -1 else device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's, if it is built without; the library's
        raise InputError(f"device={device!r} cannot be used ({str(error).partition(chr(10))[0]})") from error


@contextmanager
def generation_errors() -> Iterator[None]:
    """Name where the settings are from that generate() refuses: the library's errors do not.

    Raises:
        InputError: for a ValueError of generate().
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
    """Ends each translation at a length of its own, so that one that does not end is the same in every batch.

    Args:
        limits: new tokens of each source's translations; rows of a source stand side by side.
    """

    def __init__(self, limits: list[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        limits = self.limits.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.limits))
        return input_ids.shape[1] - 1 >= limits  # the first token is the decoder's start


class ChosenLogProbs(LogitsProcessor):
    """Changes nothing, and keeps the log probability of each token that greedy search or sampling chooses.

    The library's `output_scores` keeps the whole vocabulary's, of all steps: 1 GB for 8000 tokens out of 32,000.
    """

    def __init__(self):
        self._chosen: list[torch.Tensor] = []
        self._step: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self._step = scores.log_softmax(dim=-1)
        return scores

    def sums(self, sequences: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """(rows,), of the first `lengths` (rows,) new tokens of the `sequences` that generate() returned."""
        self._take(sequences)
        steps = torch.cat(self._chosen, dim=1)
        is_after = torch.arange(steps.shape[1], device=steps.device) >= lengths[:, None]
        return steps.masked_fill(is_after, 0).sum(dim=1)

    def _take(self, sequences: torch.LongTensor) -> None:
        if self._step is not None:
            self._chosen.append(self._step.gather(1, sequences[:, -1:]))


class Translator:
    """Translates lines with `model.generate`.

    A translation contains no special tokens, such as padding or a language's tag, however probable the model finds
    them. `suppress_tokens`, here or in the model's generation configuration, replaces this rule.

    Args:
        model: an encoder-decoder model, put into evaluation mode.
        tokenizer: its tokenizer.
        target_language: of a multilingual model: the language to translate into.
        tokens_per_batch: positions of a batch, padding included, times the number of beams; None: 8000.
        batch_size: sources of a batch at most; None: as many as fit into `tokens_per_batch`.
        buffer_lines: lines read before the first of them is translated; more of them fit together better.
        max_length_ratio: a translation ends at that many times the source's tokens plus ten, whatever length the
            model's generation configuration has. `max_length` or `max_new_tokens` among the arguments ends it earlier.
        length_alpha: search with GNMT's score, see `gnmt_beam_search`; None, and so the other: the library's score.
        coverage_beta: likewise.
        with_scores: whether translations have a score. With the library's beam search that takes memory for the logits
            of all steps, about 4 * tokens_per_batch * vocabulary bytes; with the others it is free.
        **generate_arguments (Any): for `model.generate`, such as num_beams, num_return_sequences, do_sample; what is
            not given is as in the model's generation configuration.

    Raises:
        InputError: a number that is not allowed, or GNMT's score without several beams or with what it replaces; when
            it translates, a `target_language` that is not one of the tokenizer's, or none where it has some.
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
        """The value of `batch_tokens`, as `tokens_per_batch` was called in the release before."""
        message = "batch_tokens of Translator is now called tokens_per_batch"
        if tokens_per_batch is not None:
            raise InputError(f"{message}; give tokens_per_batch={tokens_per_batch} alone")
        warnings.warn(f"{message}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
        return generate_arguments.pop("batch_tokens")

    def _setting(self, name: str, default=None):
        """What generate() will take: an argument, or what a generation configuration says."""
        configs = (self.generate_arguments.get("generation_config"), self.model.generation_config)
        values = [self.generate_arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), default)

    def _take_max_new_tokens(self) -> float:
        """The tokens that the caller's `max_new_tokens` and `max_length`, which counts the start too, allow."""
        new, length = (self.generate_arguments.pop(name, None) for name in ("max_new_tokens", "max_length"))
        for name, value, least in (("max_new_tokens", new, 1), ("max_length", length, 2)):
            if value is not None and value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        return min(math.inf if new is None else new, math.inf if length is None else length - 1)

    def _length_arguments(self, new_tokens: int) -> dict[str, int]:
        """For generate(), to allow that many tokens; it warns if both names are given, here and in the folder."""
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
        if isinstance(lines, str):  # whose letters would be taken for lines
            raise InputError(f"lines={shown(lines)} is one text, give a list of texts")
        if self.model.device.type == "meta":
            raise InputError("device='meta' holds no values, and cannot translate: take cpu or an accelerator")
        encode_sources(self.tokenizer, [], self.target_language)  # a wrong language is refused for empty lines too
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
        """The translations of encoded sources, in their order.

        Args:
            encoded: token ids as `encode_sources` gives them.
            on_batch: called with the number of sources after each batch, to show progress.
        """
        results: list[list[Translation]] = [[] for _ in encoded]
        for batch in self._batches([len(ids) for ids in encoded]):
            for number, translations in zip(batch, self._translate_batch([list(encoded[i]) for i in batch])):
                results[number] = translations
            on_batch(len(batch))
        return results

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of the sources, the longest first, in batches of at most `tokens_per_batch` positions."""
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
        positions = getattr(self.model.config, "max_position_embeddings", math.inf)  # of a Transformer
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
                # The library's beam search tells the scores of the translations with those of all steps only.
                output_scores=self.with_scores
                and self.num_beams > 1
                and "custom_generate" not in self.generate_arguments,
            )
        sequences = outputs.sequences[:, 1:]
        ends = (sequences == self.tokenizer.eos_token_id) | (sequences == self.tokenizer.pad_token_id)
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), sequences.shape[1])
        limits = torch.tensor(limits, device=lengths.device).repeat_interleave(self.num_results)
        kept = lengths + (lengths < limits)  # with the end, which one that was cut does not have
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
        """The processor that keeps the scores, and after it the one that keeps special tokens out of a translation."""
        processors = LogitsProcessorList([] if log_probs is None else [log_probs])
        if self._setting("suppress_tokens") is None:
            names = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
            wanted = {self.tokenizer.eos_token_id, *(one for name in names for one in _as_list(self._setting(name)))}
            if special := sorted(set(self.tokenizer.all_special_ids) - wanted):
                processors.append(SuppressTokensLogitsProcessor(special, device=self.model.device))
        return processors

    def _give_attention(self) -> None:
        """Of the implementations of a Transformer's attention only this one returns it."""
        if getattr(self.model.config, "_attn_implementation", None) not in (None, "eager"):
            self.model.set_attn_implementation("eager")

    @torch.no_grad()
    def attention(self, translation: Translation) -> torch.Tensor:
        """(target tokens, source tokens): where the decoder looks while it writes each token of a translation."""
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
