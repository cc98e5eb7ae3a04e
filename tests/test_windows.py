"""Windows of a token stream: every token predicted once, rows contiguous, unequal windows padded."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from moe_hf.errors import InputError
from moe_hf.training.windows import StreamWindows, collate_windows


def tokens(length):
    """A stream whose token at position i is i."""
    return np.arange(length)


@settings(deadline=None)
@given(length=st.integers(2, 60), window_length=st.integers(1, 12))
def test_independent_windows_predict_every_token_but_the_first_once(length, window_length):
    assume(length > window_length)
    windows = StreamWindows(tokens(length), window_length)
    assert len(windows) == windows.num_windows_per_row
    assert windows.num_dropped_tokens == 0
    assert torch.cat([item["input_ids"] for item in windows]).tolist() == list(range(length - 1))
    assert torch.cat([item["shift_labels"] for item in windows]).tolist() == list(range(1, length))
    lengths = [len(item["input_ids"]) for item in windows]
    assert set(lengths[:-1]) <= {window_length} and 1 <= lengths[-1] <= window_length


@settings(deadline=None)
@given(length=st.integers(2, 80), window_length=st.integers(1, 8), num_rows=st.integers(1, 6))
def test_rows_are_contiguous_and_partition_the_stream(length, window_length, num_rows):
    assume((length - 1) // num_rows >= window_length)
    windows = StreamWindows(tokens(length), window_length, num_rows)
    assert len(windows) == num_rows * windows.num_windows_per_row
    assert 0 <= windows.num_dropped_tokens < num_rows
    items = list(windows)
    rows = [torch.cat([item["input_ids"] for item in items[row::num_rows]]).tolist() for row in range(num_rows)]
    assert len({len(row) for row in rows}) == 1
    used = length - windows.num_dropped_tokens
    assert sum(rows, []) == list(range(used - 1))
    predicted = sorted(torch.cat([item["shift_labels"] for item in items]).tolist())
    assert predicted == list(range(1, used))
    for step in range(windows.num_windows_per_row):
        assert len({len(item["input_ids"]) for item in items[step * num_rows : (step + 1) * num_rows]}) == 1


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
    batches = [batch["input_ids"] for batch in loader]
    assert [batch.tolist() for batch in batches[:2]] == [[[0, 1, 2], [11, 12, 13]], [[3, 4, 5], [14, 15, 16]]]
    assert batches[-1].tolist() == [[9, 10], [20, 21]]


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
        ((tokens(10), 3, 4), "num_rows=4 cuts 10 tokens into rows of 2.* at most 3 rows"),
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
