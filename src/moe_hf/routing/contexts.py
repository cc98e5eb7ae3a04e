"""Finds, for every expert, the places in a text with the highest gate value (table 9 of the paper)."""

import numpy as np


class TopContexts:
    """Keeps the N highest gate values of each of E experts, and their positions. Memory grows with E * N.

    Attributes:
        values: (E, N), the highest first; 0 if an expert has fewer tokens.
        positions: (E, N), for equal values the earlier position first; -1 if an expert has fewer tokens.
    """

    def __init__(self, num_experts: int, size: int):
        self.size = size
        self.values = np.zeros((num_experts, size))
        self.positions = np.full((num_experts, size), -1, dtype=np.int64)

    def add(self, experts: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        """Add gate values, in any order.

        Args:
            experts: (slots,), expert ids.
            values: (slots,), gate values above 0.
            positions: (slots,), the position of each token in the text.
        """
        candidates = values >= self.values[experts, -1]
        experts, values, positions = experts[candidates], values[candidates], positions[candidates]
        order = np.lexsort((positions, -values, experts))
        experts, values, positions = experts[order], values[order], positions[order]
        rank = np.arange(len(experts)) - np.searchsorted(experts, experts)  # 0 for each expert's highest value
        kept = rank < self.size
        touched, row = np.unique(experts[kept], return_inverse=True)
        both_values = np.zeros((len(touched), 2 * self.size))
        both_positions = np.full((len(touched), 2 * self.size), -1, dtype=np.int64)
        both_values[:, : self.size], both_positions[:, : self.size] = self.values[touched], self.positions[touched]
        both_values[row, self.size + rank[kept]] = values[kept]
        both_positions[row, self.size + rank[kept]] = positions[kept]
        order = np.lexsort((both_positions, -both_values))[:, : self.size]
        self.values[touched] = np.take_along_axis(both_values, order, axis=1)
        self.positions[touched] = np.take_along_axis(both_positions, order, axis=1)
