"""Batches of about equally many tokens, of sentence pairs of about equal length, with directions drawn by temperature.

An epoch is a list of slots. The length of a slot never changes, while the pair that fills it and the order of equally
long slots are drawn anew in each epoch: so the batches differ, but their number does not, which the Trainer relies on.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from ..errors import InputError


class TokenBatchSampler(Sampler[list[int]]):
    """Lists of row numbers: the batches of one epoch, for `DataLoader(batch_sampler=...)`.

    A pair is as long as its longer side. A batch has at most `tokens_per_batch` positions, rows times longest pair, so
    that source and target, each with its padding, have at most that many. A pair longer than that is a batch of its
    own. Batches come in random order; all follows from `seed` and the epoch (`set_epoch`), in every process alike.

    Args:
        source_lengths: tokens of each pair's source, (N,).
        target_lengths: tokens of each pair's target, (N,).
        tokens_per_batch: the paper's, per process: tokens, padding included.
        seed: seed of the random order.
        directions: the direction of each pair, (N,) integers; None is one direction.
        temperature: 1 draws the directions as the data have them, and every pair exactly once an epoch. With T > 1
            direction d makes up a part proportional to n_d^(1/T) of the epoch's N pairs, so small directions are
            repeated, and of large ones another part is taken in each epoch, in turn.
        bucket_width: lengths are rounded up to a multiple of it, to mix pairs of different lengths; costs padding.
        num_processes: the batches are a multiple of it (some are split in two), and those of one step are similarly
            long. Process r of R takes the batches r, r + R, ... (accelerate does so).
        limit_name: what `tokens_per_batch` is called in errors.

    Raises:
        InputError: a bad value of an argument, or fewer pairs than processes.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        tokens_per_batch: int,
        *,
        seed: int = 0,
        directions: Sequence[int] | None = None,
        temperature: float = 1.0,
        bucket_width: int = 1,
        num_processes: int = 1,
        limit_name: str = "tokens_per_batch",
    ):
        for name, value in ((limit_name, tokens_per_batch), ("bucket_width", bucket_width)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not temperature >= 1:
            raise InputError(f"sampling_temperature={temperature} must be at least 1")
        lengths = np.maximum(source_lengths, target_lengths)
        lengths = -(-lengths // bucket_width) * bucket_width
        if len(lengths) < num_processes:
            raise InputError(f"{len(lengths)} sentence pairs cannot be spread over {num_processes} processes")
        self.seed = seed
        self.epoch = 0
        self.num_processes = num_processes
        self._slots = _make_slots(lengths, directions, temperature, seed)
        sorted_lengths = np.sort(self._slots.length)
        starts = _cut_by_tokens(sorted_lengths, tokens_per_batch)
        self._starts = _split_to_multiple(starts, len(sorted_lengths), num_processes)
        if self._starts is None:
            raise InputError(
                f"{len(starts)} batches of one sentence pair cannot be spread evenly over {num_processes} processes: "
                f"{limit_name}={tokens_per_batch} is too small"
            )

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch over all processes, the same in every epoch."""
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        slots = random.permutation(len(self._slots.length))
        slots = slots[np.argsort(self._slots.length[slots], kind="stable")]  # equally long ones stay shuffled
        batches = np.split(self._slots.pairs_of(slots, self.epoch), self._starts[1:])
        for step in random.permutation(len(batches) // self.num_processes):
            for batch in batches[step * self.num_processes : (step + 1) * self.num_processes]:
                yield batch.tolist()


@dataclass(frozen=True)
class _Slots:
    """The places of an epoch. Slot s is filled by one of candidates[first[s] : first[s] + size[s]], in turn."""

    candidates: np.ndarray
    first: np.ndarray
    size: np.ndarray
    phase: np.ndarray
    length: np.ndarray  # of the longest candidate

    def pairs_of(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        turn = (self.phase[slots] + epoch) % self.size[slots]
        return self.candidates[self.first[slots] + turn]


def _make_slots(lengths: np.ndarray, directions, temperature: float, seed: int) -> _Slots:
    """As many slots as pairs: each direction gets its share, whole copies of its pairs first.

    The rest of the share has fewer slots than pairs. Each of these slots takes turns among neighbours in the pairs
    sorted by length, so that no pair is left out forever.
    """
    directions = np.zeros(len(lengths), dtype=int) if directions is None else np.asarray(directions)
    random = np.random.default_rng(seed)
    values, counts = np.unique(directions, return_counts=True)
    candidates, first, size, num_before = [], [], [], 0
    for value, num_pairs, share in zip(values, counts, direction_shares(counts, temperature)):
        rows = random.permutation(np.flatnonzero(directions == value))
        candidates.append(rows[np.argsort(lengths[rows], kind="stable")])
        copies, num_turns = divmod(int(share), int(num_pairs))
        edges = np.arange(num_turns + 1) * num_pairs // max(num_turns, 1)
        first.append(num_before + np.concatenate([np.tile(np.arange(num_pairs), copies), edges[:-1]]))
        size.append(np.concatenate([np.ones(copies * num_pairs, dtype=int), np.diff(edges)]))
        num_before += num_pairs
    candidates, first, size = map(np.concatenate, (candidates, first, size))
    return _Slots(candidates, first, size, random.integers(0, size), lengths[candidates[first + size - 1]])


def direction_shares(counts: Sequence[int], temperature: float) -> np.ndarray:
    """How many pairs of an epoch each direction gives, in proportion to counts^(1 / temperature).

    Args:
        counts: pairs of each direction, at least 1.
        temperature: 1 or more.

    Returns:
        (directions,), at least 1 each; the sum is that of `counts`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    weights = counts ** (1 / temperature)
    total = int(counts.sum())
    # One each, the rest by weight; what rounding leaves goes to the largest remainders.
    exact = np.maximum(weights / weights.sum() * total - 1, 0)
    exact *= (total - len(counts)) / max(exact.sum(), 1e-300)
    shares = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - len(counts) - shares.sum()]] += 1
    return shares + 1


def _cut_by_tokens(sorted_lengths: np.ndarray, limit: int) -> list[int]:
    """Where batches start when each is as long as rows * (its longest, last row) <= limit allows."""
    starts, start = [], 0
    while start < len(sorted_lengths):
        starts.append(start)
        stops = range(start + 1, len(sorted_lengths) + 1)
        fitting = bisect_right(stops, limit, key=lambda stop: (stop - starts[-1]) * sorted_lengths[stop - 1])
        start += max(fitting, 1)
    return starts


def _split_to_multiple(starts: list[int], num_rows: int, num_processes: int) -> np.ndarray | None:
    """Halve the batches with the most rows until their number is a multiple of `num_processes`; None: it cannot be."""
    missing = -len(starts) % num_processes
    for _ in range(missing):
        sizes = np.diff([*starts, num_rows])
        largest = int(np.argmax(sizes))
        if sizes[largest] < 2:
            return None
        starts = [*starts[: largest + 1], starts[largest] + int(sizes[largest]) // 2, *starts[largest + 1 :]]
    return np.asarray(starts)
