"""What a `Translator` plugs into generate()."""

import torch
from transformers import LogitsProcessor, StoppingCriteria


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
