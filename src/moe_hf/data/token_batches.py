"""Batches with similar numbers of tokens and pairs of similar length, with temperature sampling of directions.

An epoch is a list of slots. The length of a slot is fixed. The pair in a slot, and the order of slots of equal length,
are drawn again in each epoch. Batches therefore differ between epochs, but their number does not, as the Trainer
expects.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from ..errors import InputError


class TokenBatchSampler(Sampler[list[int]]):
    """Yields the batches of one epoch as lists of row numbers, for `DataLoader(batch_sampler=...)`.

    The length of a pair is the length of its longer side. A batch has at most `tokens_per_batch` positions, which is
    the number of rows times the longest pair. Source and target, each with padding, are therefore both within the
    limit. A pair above the limit is a separate batch. Batches come in random order. `seed` and the epoch (`set_epoch`)
    determine the batches, equally in every process.

    Args:
        source_lengths: number of tokens of each source, (N,).
        target_lengths: number of tokens of each target, (N,).
        tokens_per_batch: maximal number of tokens of a batch and process, including padding.
        seed: seed of the random order.
        directions: the direction of each pair, (N,) integers; None: a single direction.
        temperature: 1 samples the directions as in the data, with every pair exactly once per epoch. With T > 1, the
            share of direction d in the epoch's N pairs is proportional to n_d^(1/T). Pairs of small directions are
            then repeated, and each epoch has another part of the large directions.
        bucket_width: lengths are rounded up to a multiple of this number, which mixes lengths but adds padding.
        num_processes: the number of batches is a multiple of it (some batches are split in two), and the batches of
            one step have similar lengths. Process r of R gets the batches r, r + R, ..., as in accelerate.
        limit_name: the name of `tokens_per_batch` in error messages.

    Raises:
        InputError: an argument is out of range, or there are fewer pairs than processes.
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
        """Set the epoch, counted from 0, of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch over all processes, which is the same in every epoch."""
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        slots = random.permutation(len(self._slots.length))
        slots = slots[np.argsort(self._slots.length[slots], kind="stable")]  # slots of equal length stay shuffled
        batches = np.split(self._slots.pairs_of(slots, self.epoch), self._starts[1:])
        for step in random.permutation(len(batches) // self.num_processes):
            for batch in batches[step * self.num_processes : (step + 1) * self.num_processes]:
                yield batch.tolist()


@dataclass(frozen=True)
class _Slots:
    """The slots of an epoch. Slot s holds one of candidates[first[s] : first[s] + size[s]], in turn."""

    candidates: np.ndarray
    first: np.ndarray
    size: np.ndarray
    phase: np.ndarray
    length: np.ndarray  # length of the longest candidate

    def pairs_of(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        turn = (self.phase[slots] + epoch) % self.size[slots]
        return self.candidates[self.first[slots] + turn]


def _make_slots(lengths: np.ndarray, directions, temperature: float, seed: int) -> _Slots:
    """Make as many slots as pairs. Each direction gets its share of slots, first for whole copies of its pairs.

    The rest of the share has fewer slots than pairs. Each of these slots alternates between pairs of similar length,
    so that every pair is used in some epoch.
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
    """Return each direction's number of pairs in an epoch, in proportion to counts^(1 / temperature).

    Args:
        counts: number of pairs of each direction, at least 1.
        temperature: 1 or more.

    Returns:
        (directions,), at least 1 each, with the same sum as `counts`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    weights = counts ** (1 / temperature)
    total = int(counts.sum())
    # One pair each, the rest by weight; the largest remainders get the pairs left over by rounding.
    exact = np.maximum(weights / weights.sum() * total - 1, 0)
    exact *= (total - len(counts)) / max(exact.sum(), 1e-300)
    shares = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - len(counts) - shares.sum()]] += 1
    return shares + 1


def _cut_by_tokens(sorted_lengths: np.ndarray, limit: int) -> list[int]:
    """Return the starts of batches that are as large as rows * (longest row, the last one) <= limit allows."""
    starts, start = [], 0
    while start < len(sorted_lengths):
        starts.append(start)
        stops = range(start + 1, len(sorted_lengths) + 1)
        fitting = bisect_right(stops, limit, key=lambda stop: (stop - starts[-1]) * sorted_lengths[stop - 1])
        start += max(fitting, 1)
    return starts


def _split_to_multiple(starts: list[int], num_rows: int, num_processes: int) -> np.ndarray | None:
    """Halve the batches with the most rows until their number is a multiple of `num_processes`; None if impossible."""
    missing = -len(starts) % num_processes
    for _ in range(missing):
        sizes = np.diff([*starts, num_rows])
        largest = int(np.argmax(sizes))
        if sizes[largest] < 2:
            return None
        starts = [*starts[: largest + 1], starts[largest] + int(sizes[largest]) // 2, *starts[largest + 1 :]]
    return np.asarray(starts)
