"""Cuts a token stream into windows: independent ones, or rows whose state is carried from batch to batch.

Shape suffixes: S tokens of a window.
"""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from ..errors import InputError


class StreamWindows(Dataset):
    """Windows {"input_ids", "labels", "shift_labels"}, each int64 (S,), of a token stream.

    `labels` equals `input_ids`. `shift_labels` has the next token of every position, including the last. Every token
    of the stream except the first is predicted exactly once.

    Args:
        stream: a sequence that slices to int64 arrays, such as a `TokenStream`.
        window_length: S; the last window (of every row) may be shorter.
        num_rows: None: independent windows; window i starts at token i * S. R: the stream is cut into R contiguous
            rows, and item j * R + r is window j of row r, so that batches of R consecutive items keep the rows
            aligned. Rows have equal lengths, but the stream may lack up to R - 1 tokens at its end. The last windows
            of the last rows are then shorter or empty.

    Raises:
        InputError: window_length or num_rows is below 1, or the stream or a row is shorter than one window.
    """

    def __init__(self, stream: Sequence, window_length: int, num_rows: int | None = None):
        if window_length < 1:
            raise InputError(f"window_length={window_length} must be at least 1")
        if num_rows is not None and num_rows < 1:
            raise InputError(f"num_rows={num_rows} must be at least 1 (or None for independent windows)")
        num_tokens = len(stream)
        if num_tokens < window_length + 1:
            raise InputError(f"the stream has {num_tokens} tokens, fewer than window_length={window_length} + 1")
        self.stream = stream
        self.window_length = window_length
        self.num_rows = num_rows
        self._row_step = num_rows or 1
        self._num_positions = num_tokens - 1  # the last token is only predicted
        self._row_length = -(-self._num_positions // self._row_step)
        if self._num_positions // self._row_step < window_length:
            largest = (num_tokens - 1) // window_length
            raise InputError(
                f"num_rows={num_rows} cuts {num_tokens} tokens into rows shorter than window_length={window_length}; "
                f"at most {largest} rows are possible"
            )
        self.num_windows_per_row = -(-self._row_length // window_length)

    def __len__(self) -> int:
        return self._row_step * self.num_windows_per_row

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window, row = divmod(range(len(self))[index], self._row_step)
        row_start = row * self._row_length
        row_stop = min(row_start + self._row_length, self._num_positions)
        start = min(row_start + window * self.window_length, row_stop)
        stop = min(start + self.window_length, row_stop)
        tokens = torch.from_numpy(self.stream[start : stop + 1])
        input_ids_S, shift_labels_S = tokens[:-1], tokens[1:]
        return {"input_ids": input_ids_S, "labels": input_ids_S.clone(), "shift_labels": shift_labels_S.clone()}


def collate_windows(items: list[dict[str, torch.Tensor]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Stack windows to int64 (B, S); pad unequal windows on the right (labels: -100), with an attention_mask.

    S is at least 1: if all windows are empty, as at the end of short rows, there is one position of padding.
    """
    lengths = [len(item["input_ids"]) for item in items]
    longest = max([1, *lengths])
    if min(lengths) == longest:
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}
    batch = {}
    for key in items[0]:
        padding = pad_token_id if key == "input_ids" else -100
        rows = [torch.nn.functional.pad(item[key], (0, longest - len(item[key])), value=padding) for item in items]
        batch[key] = torch.stack(rows)
    positions = torch.arange(longest)
    batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
    return batch
