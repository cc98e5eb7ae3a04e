"""Counts which experts get the same tokens.

Shape suffixes: T tokens, K experts per token, N pairs.
"""

import numpy as np

MERGE_EVERY = 1 << 20


class PairCounts:
    """Counts how often two experts were chosen for the same token, with memory only for pairs that occur.

    Args:
        num_experts: E.
        group_size: number of experts in a group of a hierarchical gate; None: all experts are one group.
        max_pairs: maximal number of pairs to keep. Beyond it, the rarest pairs are dropped, and a count may be too low
            by up to `missed`.
    """

    def __init__(self, num_experts: int, group_size: int | None = None, max_pairs: int = 1 << 22):
        self.num_experts, self.group_size, self.max_pairs = num_experts, group_size or num_experts, max_pairs
        self.missed = 0
        self.num_inside = self.num_across = 0  # pairs in all, inside a group and across groups
        self._keys = self._counts = np.zeros(0, dtype=np.int64)
        self._new: list[np.ndarray] = []
        self._num_new = 0

    def add(self, experts_TK: np.ndarray, num_used_T: np.ndarray) -> None:
        """Count the pairs of every token.

        Args:
            experts_TK: (T, K) expert ids.
            num_used_T: (T,), number of used ids of each token, from the first.
        """
        for k in np.unique(num_used_T[num_used_T > 1]).tolist():
            rows = experts_TK[num_used_T == k, :k].astype(np.int64)
            left, right = np.triu_indices(k, 1)
            for part in np.array_split(rows, -(-rows.shape[0] * len(left) // MERGE_EVERY)):
                a, b = part[:, left].ravel(), part[:, right].ravel()
                inside = int((a // self.group_size == b // self.group_size).sum())
                self.num_inside += inside
                self.num_across += len(a) - inside
                self._new.append(np.minimum(a, b) * self.num_experts + np.maximum(a, b))
                self._num_new += len(a)
                if self._num_new >= MERGE_EVERY:
                    self._merge()

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all pairs that occurred: experts (N,) and (N,), the smaller id first, and counts (N,)."""
        self._merge()
        return self._keys // self.num_experts, self._keys % self.num_experts, self._counts

    def expected(self, first_N: np.ndarray, second_N: np.ndarray, load_E: np.ndarray) -> np.ndarray:
        """Return the counts (N,) expected for random pairs, in proportion to the experts' loads.

        expected_ij = C load_i load_j, with C such that the expected and the observed total are equal. For a token of k
        experts, the plain product load_i load_j / T is too large by k / (k - 1), because an expert is not paired with
        itself.

        A hierarchical gate chooses its experts from few groups. Pairs inside a group and pairs across groups therefore
        have separate values of C, so that the hierarchy itself does not count as a preference.

        Args:
            first_N: (N,), one expert of each pair.
            second_N: (N,), the other.
            load_E: (E,), tokens of each expert.
        """
        load_E = load_E.astype(np.float64)
        of_groups = load_E.reshape(-1, self.group_size).sum(axis=1)
        weight_inside = ((of_groups**2).sum() - (load_E**2).sum()) / 2
        weight_across = (load_E.sum() ** 2 - (of_groups**2).sum()) / 2
        inside = first_N // self.group_size == second_N // self.group_size
        scale_inside = self.num_inside / weight_inside if self.num_inside else 0.0
        scale_across = self.num_across / weight_across if self.num_across else 0.0
        return np.where(inside, scale_inside, scale_across) * load_E[first_N] * load_E[second_N]

    def _merge(self) -> None:
        if not self._new:
            return
        keys = np.concatenate([self._keys, *self._new])
        counts = np.concatenate([self._counts, np.ones(self._num_new, dtype=np.int64)])
        self._new, self._num_new = [], 0
        self._keys, place = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(place, weights=counts).astype(np.int64)
        if len(self._keys) > self.max_pairs:
            order = np.argsort(-self._counts, kind="stable")
            self.missed += int(self._counts[order[self.max_pairs]])
            kept = np.sort(order[: self.max_pairs])
            self._keys, self._counts = self._keys[kept], self._counts[kept]
