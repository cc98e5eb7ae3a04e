"""Cuts a text into the batches of `collect_routing`, and keeps the tokens that each side of a model reads.

Shape suffixes: B batch, S sequence, P positions of a text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import DynamicCache

from ..data.windows import StreamWindows, collate_windows
from ..errors import InputError


@dataclass(frozen=True)
class SideText:
    """The tokens that one side of a model reads.

    Attributes:
        ids: (P,), the tokens.
        following: (P,), the token after each token; -1 if there is none.
        starts: positions at which the side starts to read, in rising order. Contexts do not extend across them.
    """

    ids: np.ndarray
    following: np.ndarray
    starts: np.ndarray


class StreamText:
    """A stream of tokens for a language model, cut into rows as `evaluate_lm` does.

    Args:
        stream: a `TokenStream`, or an array of ids, of at least 2 tokens. The last token used is only predicted.
        window_length: as for `evaluate_lm`; a short text has shorter windows.
        batch_size: as for `evaluate_lm`; a short text has fewer rows.
        max_tokens: maximal number of tokens read.
        carry_state: as for `evaluate_lm`.
    """

    def __init__(
        self, stream: Sequence, window_length: int, batch_size: int, max_tokens: int, carry_state: bool = True
    ):
        ids = np.asarray(stream[: max_tokens + 1])
        num_positions = len(ids) - 1
        window_length = min(window_length, num_positions)
        self.num_rows = max(1, min(batch_size, num_positions // window_length))
        # The windows hold positions; `batches` looks up the tokens.
        self._windows = StreamWindows(np.arange(len(ids)), window_length, num_rows=self.num_rows)
        self.carry_state = carry_state
        windows = range(self.num_rows if carry_state else len(self._windows))
        firsts = [self._windows[number]["input_ids"][:1] for number in windows]
        self.sides = {"": SideText(ids[:-1], ids[1:], np.unique(torch.cat(firsts).numpy()))}

    def batches(self, config) -> Iterator[tuple[dict, dict[str, torch.Tensor]]]:
        """Yield the batches for `collect_routing`, for a model of this configuration."""
        cache = DynamicCache(config=config) if self.carry_state else None  # each batch updates it in place
        for start in range(0, len(self._windows), self.num_rows):
            items = [self._windows[number] for number in range(start, start + self.num_rows)]
            positions_BS = collate_windows(items, pad_token_id=-1)["input_ids"]
            inputs = {"input_ids": _look_up(self.sides[""].ids, positions_BS, 0), "attention_mask": positions_BS >= 0}
            yield inputs | {"past_key_values": cache, "use_cache": self.carry_state}, {"": positions_BS}


class PairText:
    """Sentence pairs for a translation model.

    The encoder reads the sources. The decoder reads the targets from its start token to the last word, as in training.

    Args:
        tokens: the result of `tokenize_pairs`.
        decoder_start_token_id: the value in the model's configuration.
        batch_size: number of pairs in a batch. Pairs of similar length share a batch.
        max_tokens: maximal number of tokens on each side. The first pair that would exceed it ends the text.

    Raises:
        InputError: the first pair alone exceeds `max_tokens`.
    """

    def __init__(self, tokens: Dataset, decoder_start_token_id: int, batch_size: int, max_tokens: int):
        sources, targets, longest = [], [], 0
        totals = np.zeros(2, dtype=np.int64)
        for row in tokens.select_columns(["input_ids", "labels"]):
            totals += len(row["input_ids"]), len(row["labels"])
            longest = totals.max() if not sources else longest
            if totals.max() > max_tokens:
                break
            sources.append(row["input_ids"])
            targets.append(row["labels"])
        if not sources:
            raise InputError(f"max_tokens={max_tokens} is too small, the first pair has {longest} tokens on one side")
        inputs = [[decoder_start_token_id, *ids[:-1]] for ids in targets]
        self.sides = {
            "encoder": SideText(np.concatenate(sources), _following(sources), _starts(sources)),
            "decoder": SideText(np.concatenate(inputs), np.concatenate(targets), _starts(inputs)),
        }
        self.batch_size = batch_size
        self._lengths = {"encoder": [len(ids) for ids in sources], "decoder": [len(ids) for ids in inputs]}

    def batches(self, config) -> Iterator[tuple[dict, dict[str, torch.Tensor]]]:
        """Yield the batches for `collect_routing`, for a model of this configuration."""
        order = np.lexsort((self._lengths["decoder"], self._lengths["encoder"]))
        padding = config.pad_token_id or 0
        for start in range(0, len(order), self.batch_size):
            pairs = order[start : start + self.batch_size]
            positions = {side: self._positions(side, pairs) for side in self.sides}
            ids = {side: _look_up(self.sides[side].ids, positions[side], padding) for side in self.sides}
            yield (
                {
                    "input_ids": ids["encoder"],
                    "attention_mask": positions["encoder"] >= 0,
                    "decoder_input_ids": ids["decoder"],
                    "decoder_attention_mask": positions["decoder"] >= 0,
                    "use_cache": False,
                },
                positions,
            )

    def _positions(self, side: str, pairs: np.ndarray) -> torch.Tensor:
        """Return positions (B, S), -1 for padding."""
        rows = [torch.arange(self._lengths[side][pair]) + int(self.sides[side].starts[pair]) for pair in pairs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _look_up(ids_P: np.ndarray, positions_BS: torch.Tensor, padding: int) -> torch.Tensor:
    """Return the tokens (B, S) at the positions, as int64."""
    ids_BS = torch.from_numpy(ids_P[positions_BS.clamp(min=0).numpy()]).long()
    return ids_BS.masked_fill(positions_BS < 0, padding)


def _following(sentences: list[list[int]]) -> np.ndarray:
    return np.concatenate([[*ids[1:], -1] for ids in sentences])


def _starts(sentences: list[list[int]]) -> np.ndarray:
    return np.cumsum([0, *map(len, sentences[:-1])])
