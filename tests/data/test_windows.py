"""Windows of a token stream: every token predicted once, rows contiguous, unequal windows padded."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from moe_hf.data.windows import StreamWindows, collate_windows
from moe_hf.errors import InputError


def tokens(length):
    """A stream whose token at position i is i."""
    return np.arange(length)


@settings(deadline=None)
@given(length=st.integers(2, 60), window_length=st.integers(1, 12))
def test_independent_windows_predict_every_token_but_the_first_once(length, window_length):
    assume(length > window_length)
    windows = StreamWindows(tokens(length), window_length)
    assert len(windows) == windows.num_windows_per_row
    assert torch.cat([item["input_ids"] for item in windows]).tolist() == list(range(length - 1))
    assert torch.cat([item["shift_labels"] for item in windows]).tolist() == list(range(1, length))
    lengths = [len(item["input_ids"]) for item in windows]
    assert set(lengths[:-1]) <= {window_length} and 1 <= lengths[-1] <= window_length


@settings(deadline=None)
@given(length=st.integers(2, 80), window_length=st.integers(1, 8), num_rows=st.integers(1, 6))
def test_rows_are_contiguous_and_predict_every_token_but_the_first_once(length, window_length, num_rows):
    assume((length - 1) // num_rows >= window_length)
    windows = StreamWindows(tokens(length), window_length, num_rows)
    assert len(windows) == num_rows * windows.num_windows_per_row
    items = list(windows)
    rows = [torch.cat([item["input_ids"] for item in items[row::num_rows]]).tolist() for row in range(num_rows)]
    assert sum(rows, []) == list(range(length - 1))
    row_lengths = [len(row) for row in rows]
    assert row_lengths == sorted(row_lengths, reverse=True)
    assert sum(max(row_lengths) - length for length in row_lengths) < num_rows  # only the stream's end is missing
    predicted = [
        torch.cat([item["shift_labels"] for item in items[row::num_rows]]).tolist() for row in range(num_rows)
    ]
    assert sum(predicted, []) == list(range(1, length))
    for step in range(windows.num_windows_per_row):
        lengths = [len(item["input_ids"]) for item in items[step * num_rows : (step + 1) * num_rows]]
        assert lengths == sorted(lengths, reverse=True) and 1 <= lengths[0] <= window_length


@pytest.mark.parametrize("num_rows", [None, 3])
def test_labels_are_the_tokens_and_shift_labels_the_next_ones(num_rows):
    for item in StreamWindows(tokens(30), 4, num_rows):
        assert all(value.dtype == torch.int64 for value in item.values())
        assert torch.equal(item["labels"], item["input_ids"])
        assert torch.equal(item["shift_labels"], item["input_ids"] + 1)


def test_masking_labels_leaves_inputs_alone():
    item = StreamWindows(tokens(10), 4)[0]
    item["labels"].fill_(-100)
    item["shift_labels"].fill_(-100)
    assert item["input_ids"].tolist() == [0, 1, 2, 3]


def test_sequential_batches_carry_rows_on():
    windows = StreamWindows(tokens(24), 3, num_rows=2)
    loader = DataLoader(windows, batch_size=2, sampler=SequentialSampler(windows), collate_fn=collate_windows)
    batches = list(loader)
    assert [batch["input_ids"].tolist() for batch in batches[:2]] == [
        [[0, 1, 2], [12, 13, 14]],
        [[3, 4, 5], [15, 16, 17]],
    ]
    assert batches[-1]["input_ids"].tolist() == [[9, 10, 11], [21, 22, 0]]
    assert batches[-1]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batches[-1]["shift_labels"].tolist() == [[10, 11, 12], [22, 23, -100]]


def test_index_past_the_end_is_refused():
    windows = StreamWindows(tokens(10), 4)
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tokens(10), 0), "window_length=0 must be at least 1"),
        ((tokens(10), 10), r"has 10 tokens, fewer than window_length=10 \+ 1"),
        ((tokens(10), 2, 0), "num_rows=0 must be at least 1"),
        ((tokens(10), 3, 4), "num_rows=4 cuts 10 tokens into rows shorter than window_length=3; at most 3 rows"),
    ],
)
def test_bad_argument_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        StreamWindows(*arguments)


def test_largest_allowed_number_of_rows_works():
    assert len(StreamWindows(tokens(10), 3, 3)) == 3


def test_equal_windows_are_stacked_without_mask():
    windows = StreamWindows(tokens(9), 4)
    batch = collate_windows([windows[0], windows[1]])
    assert set(batch) == {"input_ids", "labels", "shift_labels"}
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_unequal_windows_are_padded_on_the_right():
    windows = StreamWindows(tokens(7), 4)
    batch = collate_windows([windows[0], windows[1]], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 99, 99]]
    assert batch["labels"].tolist() == [[0, 1, 2, 3], [4, 5, -100, -100]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4], [5, 6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("num_items", [1, 2])
def test_windows_without_tokens_are_one_position_of_padding(num_items):
    windows = StreamWindows(tokens(11), 3, num_rows=3)  # rows of 4, 4 and 2 positions
    batch = collate_windows([windows[5]] * num_items, pad_token_id=7)
    assert batch["input_ids"].tolist() == [[7]] * num_items
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[-100]] * num_items
    assert batch["attention_mask"].tolist() == [[0]] * num_items
