"""The prefixes of many IDs as sorted integers: a tree of a few arrays, of which a question reads a few numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """
    The distinct prefixes of one length, sorted; their places are their ranks.

    Args:
        keys (array of shape `(n,)`, int64): rank of the prefix that is one code shorter · K + last code.
        starts (array of shape `(n + 1,)`, int64): where the rows of each prefix begin, among all rows sorted by ID.
    """

    keys: np.ndarray
    starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """`(n,)`: how many rows each prefix has."""
        return np.diff(self.starts)

    @property
    def collision_rate(self) -> float:
        """The share of rows that have their prefix in common with another row."""
        return float(self.counts[self.counts > 1].sum() / self.starts[-1])


class PrefixTree:
    """
    Args:
        codes (array of shape `(N, L)`, int64): one ID per row; those of level d in [0, K_d).
        sizes: K_1, ..., K_L.
    """

    def __init__(self, codes: np.ndarray, sizes: Sequence[int]):
        self.sizes = sizes
        self.levels = []
        ranks = np.zeros(len(codes), np.int64)
        for column, size in zip(codes.T, sizes):
            keys, ranks, counts = np.unique(ranks * size + column, return_inverse=True, return_counts=True)
            self.levels.append(Level(keys, np.concatenate([[0], counts.cumsum()])))
        self._order = ranks.argsort(kind="stable")  # rows sorted by ID

    def find(self, prefix: Sequence[int]) -> int | None:
        """The rank of a prefix among those of its length; `None` if no ID begins with it."""
        if len(prefix) > len(self.sizes):
            return None
        rank = 0
        for code, size, level in zip(prefix, self.sizes, self.levels):
            key = rank * size + code
            rank = int(level.keys.searchsorted(key)) if 0 <= code < size else len(level.keys)
            if rank == len(level.keys) or level.keys[rank] != key:
                return None
        return rank

    def next_codes(self, prefix: Sequence[int]) -> np.ndarray:
        """The codes that follow a prefix, ascending; none where no ID begins with it, and after a whole ID."""
        rank = self.find(prefix)
        if rank is None or len(prefix) == len(self.sizes):
            return np.empty(0, np.int64)
        size, keys = self.sizes[len(prefix)], self.levels[len(prefix)].keys
        start, stop = keys.searchsorted([rank * size, (rank + 1) * size])
        return keys[start:stop] - rank * size

    def rows(self, prefix: Sequence[int]) -> np.ndarray:
        """The rows whose ID begins with a prefix, in the order of their IDs."""
        rank = self.find(prefix)
        if rank is None:
            return self._order[:0]
        start, stop = self.levels[len(prefix) - 1].starts[rank : rank + 2] if len(prefix) else (0, len(self._order))
        return self._order[start:stop]

    def ranks(self) -> np.ndarray:
        """`(N,)`: the rank of each row's ID among the distinct IDs."""
        counts = self.levels[-1].counts
        ranks = np.empty_like(self._order)
        ranks[self._order] = np.repeat(np.arange(len(counts)), counts)
        return ranks

    def numbers(self) -> np.ndarray:
        """`(N,)`: which row of its ID each row is, counted from 0."""
        level = self.levels[-1]
        numbers = np.empty_like(self._order)
        numbers[self._order] = np.arange(len(self._order)) - np.repeat(level.starts[:-1], level.counts)
        return numbers
