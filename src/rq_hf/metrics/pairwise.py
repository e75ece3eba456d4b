"""Squared distances of pairs of features."""

import torch

ROWS, COLUMNS = 2048, 4096  # of a block of distances, where those of all pairs need too much memory
ROUNDING = 1e-12


def squared_distances(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Squared distances `(N, M)` in float64 between features `(N, F)` and `(M, F)`.

    Those too small to tell from rounding are 0, so that equal features have the distance 0.
    """
    others = others.double()
    center = others.mean(dim=0)  # distances do not depend on the origin; with a near one, rounding is least
    features, others = features.double() - center, others - center
    norms = features.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    distances = torch.addmm(norms, features, others.T, alpha=-2)
    return distances.masked_fill_(distances < ROUNDING * norms, 0)
