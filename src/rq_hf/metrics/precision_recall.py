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
    radii, reference_radii = (
        torch.cat([nearest(rows, x, neighbours + 1) for rows in x.split(ROWS)]) for x in (features, reference)
    )
    is_precise, is_recalled = (torch.zeros_like(r, dtype=torch.bool) for r in (radii, reference_radii))
    for rows, row_radii, precise in zip(*(x.split(ROWS) for x in (features, radii, is_precise))):
        columns = (x.split(COLUMNS) for x in (reference, reference_radii, is_recalled))
        for others, other_radii, recalled in zip(*columns):
            distances = squared_distances(rows, others)
            precise |= (distances <= other_radii).any(dim=1)
            recalled |= (distances <= row_radii[:, None]).any(dim=0)
    return {"precision": is_precise.double().mean().item(), "recall": is_recalled.double().mean().item()}


def nearest(features: torch.Tensor, reference: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distances `(N,)` of features to their k-th nearest feature of the reference."""
    smallest = features.new_empty(len(features), 0, dtype=torch.double)
    for columns in reference.split(COLUMNS):
        distances = torch.cat([smallest, squared_distances(features, columns)], dim=1)
        smallest = distances.topk(min(k, distances.shape[1]), largest=False).values
    return smallest[:, -1]
