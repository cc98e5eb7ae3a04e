"""Translate many lines with a trained model: batches by length inside, results in the order of the lines."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .errors import InputError
from .generation import gnmt_beam_search
from .training.translation_tokenizers import encode_sources


@dataclass(frozen=True)
class Translation:
    """One translation of a line.

    text: without special tokens. score: what the search ranks by, for greedy search and sampling the log probability;
    0 for an empty line. source_ids, target_ids: tokens, the target's without the start and what follows its end.
    """

    text: str
    score: float
    source_ids: list[int]
    target_ids: list[int]


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


class Translator:
    """Translates lines with `model.generate`.

    Args:
        model: an encoder-decoder model, put into evaluation mode.
        tokenizer: its tokenizer.
        target_language: of a multilingual model: the language to translate into.
        batch_tokens: positions of a batch, padding included, times the number of beams.
        buffer_lines: lines read before the first of them is translated; more of them fit together better.
        max_length_ratio: a translation ends at that many times the source's tokens plus ten.
        length_alpha, coverage_beta: search with GNMT's score, see `gnmt_beam_search`; both None for the library's own.
        generate_arguments: for `model.generate`, such as num_beams, num_return_sequences, do_sample.

    Raises:
        InputError: a number that must be at least 1 is not; when it translates, a `target_language` that is not one of
            the tokenizer's, or none where it has some.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_language: str | None = None,
        *,
        batch_tokens: int = 8000,
        buffer_lines: int = 2000,
        max_length_ratio: float = 3.0,
        length_alpha: float | None = None,
        coverage_beta: float | None = None,
        **generate_arguments,
    ):
        for name, value in (("batch_tokens", batch_tokens), ("buffer_lines", buffer_lines)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        self.model, self.tokenizer, self.target_language = model.eval(), tokenizer, target_language
        self.batch_tokens, self.buffer_lines, self.max_length_ratio = batch_tokens, buffer_lines, max_length_ratio
        self.generate_arguments = dict(generate_arguments)
        if length_alpha is not None or coverage_beta is not None:
            self.generate_arguments |= {"custom_generate": gnmt_beam_search}
            self.generate_arguments |= {"length_alpha": length_alpha or 0.0, "coverage_beta": coverage_beta or 0.0}
        self.num_results = self.generate_arguments.get("num_return_sequences") or 1

    def translate(self, lines: Iterable[str]) -> Iterator[list[Translation]]:
        """Yield the translations of each line, as many as `num_return_sequences`, best first. An empty line gives
        empty ones."""
        encode_sources(self.tokenizer, [], self.target_language)  # a wrong language is refused for empty lines too
        lines = iter(lines)
        while chunk := list(islice(lines, self.buffer_lines)):
            full = [number for number, line in enumerate(chunk) if line.strip()]
            encoded = encode_sources(self.tokenizer, [chunk[number] for number in full], self.target_language)
            results = dict(zip(full, self.translate_ids(encoded)))
            for number in range(len(chunk)):
                yield results.get(number) or [Translation("", 0.0, [], [])] * self.num_results

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
        """Numbers of the sources, the longest first, in batches of at most `batch_tokens` positions over all beams."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        beams = max(self.generate_arguments.get("num_beams") or 1, self.num_results)
        start = 0
        while start < len(order):
            size = max(1, self.batch_tokens // (lengths[order[start]] * beams))
            yield order[start : start + size]
            start += size

    @torch.no_grad()
    def _translate_batch(self, sources: list[list[int]]) -> list[list[Translation]]:
        inputs = self.tokenizer.pad({"input_ids": sources}, return_tensors="pt", padding_side="right")
        limits = [int(self.max_length_ratio * len(ids)) + 10 for ids in sources]
        outputs = self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            **({"max_new_tokens": max(limits)} | self.generate_arguments),
            stopping_criteria=StoppingCriteriaList([LengthLimits(limits)]),
            return_dict_in_generate=True,
            output_scores=True,
        )
        sequences, scores = outputs.sequences[:, 1:], outputs.get("sequences_scores")
        ends = (sequences == self.tokenizer.eos_token_id) | (sequences == self.tokenizer.pad_token_id)
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), sequences.shape[1])
        limits = torch.tensor(limits, device=lengths.device).repeat_interleave(self.num_results)
        kept = lengths + (lengths < limits)  # with the end, which one that was cut does not have
        if scores is None:  # not a beam search
            steps = self.model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
            places = torch.arange(steps.shape[1], device=steps.device)
            scores = steps.masked_fill(places >= kept[:, None], 0).sum(dim=1)
        translations = []
        for row, ids in enumerate(sequences.tolist()):
            text = self.tokenizer.decode(ids[: lengths[row]], skip_special_tokens=True)
            source = sources[row // self.num_results]
            translations.append(Translation(text, scores[row].item(), source, ids[: kept[row]]))
        return [translations[i : i + self.num_results] for i in range(0, len(translations), self.num_results)]

    @torch.no_grad()
    def attention(self, translation: Translation) -> torch.Tensor:
        """(target tokens, source tokens): where the decoder looks while it writes each token of a translation."""
        device = self.model.device
        outputs = self.model(
            input_ids=torch.tensor([translation.source_ids], device=device),
            labels=torch.tensor([translation.target_ids], device=device),
            output_attentions=True,
        )
        return outputs.cross_attentions[-1][0].mean(dim=0)
