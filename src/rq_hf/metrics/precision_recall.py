"""Precision and recall of features by nearest neighbours."""

import torch

from ..argument_checks import check_integer
from .moments import check_pair
from .pairwise import COLUMNS, ROWS, squared_distances


@torch.no_grad()
def precision_recall(features: torch.Tensor, reference: torch.Tensor, *, neighbours: int = 3) -> dict[str, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, section 2), with distances in float64.

    A set of features stands for the balls around them, each of which reaches to the k-th nearest other feature of the
    set. Precision is the share of `features` in the balls of `reference`, recall the share of `reference` in the balls
    of `features`. Both depend on N and M.

    Args:
        features, reference: `(N, F)` and `(M, F)`.
        neighbours: k, less than N and M.

    Returns:
        `precision` and `recall`, in [0, 1].

    Raises `TypeError`/`ValueError` for other values, NaN, and features of another length.
    """
    check_pair(features, reference)
    check_integer("neighbours", neighbours, 1, min(len(features), len(reference)) - 1)
    return {
        "precision": share_within(features, reference, neighbours),
        "recall": share_within(reference, features, neighbours),
    }


def share_within(features: torch.Tensor, reference: torch.Tensor, neighbours: int) -> float:
    """The share of the features in at least one of the balls of the reference."""
    radii = torch.cat([nearest(rows, reference, neighbours + 1) for rows in reference.split(ROWS)])
    within = 0
    for rows in features.split(ROWS):
        blocks = zip(reference.split(COLUMNS), radii.split(COLUMNS))
        within += torch.stack([(squared_distances(rows, x) <= r).any(dim=1) for x, r in blocks]).any(dim=0).sum()
    return within.item() / len(features)


def nearest(features: torch.Tensor, reference: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distances `(N,)` of features to their k-th nearest feature of the reference."""
    smallest = features.new_empty(len(features), 0, dtype=torch.double)
    for columns in reference.split(COLUMNS):
        distances = torch.cat([smallest, squared_distances(features, columns)], dim=1)
        smallest = distances.topk(min(k, distances.shape[1]), largest=False).values
    return smallest[:, -1]
