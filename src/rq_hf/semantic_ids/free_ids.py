"""IDs that no item has, near to a vector."""

import numpy as np

from .prefix_tree import PrefixTree


class FreeIds:
    """
    The IDs that are not taken.

    Args:
        tree: of those that are.
        codebooks: one array `(K_d, C)` per level.
    """

    def __init__(self, tree: PrefixTree, codebooks: list[np.ndarray]):
        self.tree = tree
        self.codebooks = codebooks
        self._taken = {}  # by all codes but the last: whether each of the K_L IDs is taken; only what was asked for
        self._full = set()  # prefixes under which all IDs are taken

    def take_nearest(self, own: tuple[int, ...], latent: np.ndarray) -> tuple[int, ...] | None:
        """
        Takes the free ID that has as many first codes of `own` as possible and is then the nearest to `latent` `(C,)`,
        code after code; `None` if all IDs are taken.
        """
        residuals = [latent]
        for codebook, code in zip(self.codebooks, own):
            residuals.append(residuals[-1] - codebook[code])
        for length in range(len(own) - 1, -1, -1):
            found = self._nearest(own[:length], residuals[length])
            if found is not None:
                self._last_codes(found[:-1])[found[-1]] = True
                return found
        return None

    def _nearest(self, prefix: tuple[int, ...], residual: np.ndarray) -> tuple[int, ...] | None:
        if prefix in self._full:
            return None
        codebook = self.codebooks[len(prefix)]
        nearest_first = np.square(codebook - residual).sum(axis=1).argsort(kind="stable")
        if len(prefix) == len(self.codebooks) - 1:
            free = nearest_first[~self._last_codes(prefix)[nearest_first]]
            if len(free):
                return *prefix, int(free[0])
        else:
            for code in nearest_first.tolist():
                found = self._nearest((*prefix, code), residual - codebook[code])
                if found is not None:
                    return found
        self._full.add(prefix)
        return None

    def _last_codes(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self._taken:
            self._taken[prefix] = np.zeros(len(self.codebooks[-1]), bool)
            self._taken[prefix][self.tree.next_codes(prefix)] = True
        return self._taken[prefix]
