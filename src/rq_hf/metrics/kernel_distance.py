"""Maximum mean discrepancies between sets of features."""

import torch

from ..argument_checks import check_integer, check_size
from .moments import check_pair
from .pairwise import COLUMNS, ROWS, squared_distances
from .subsets import check_generator, random_rows

CMMD_SIGMA, CMMD_SCALE = 10, 1000


@torch.no_grad()
def kernel_inception_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """
    KID (Bińkowski et al. 2018, section 4): the squared maximum mean discrepancy with the kernel (x·y / F + 1)³, by the
    unbiased estimator (Gretton et al. 2012, eq. 3), in float64. It can be less than 0.

    Args:
        features, reference: `(N, F)` and `(M, F)`.
        subsets: number of estimates, each from a random subset of both.
        subset_size: of each, without repetition: at least 2, and at most N and M.
        generator: on the CPU, of the subsets; `None` for the one of PyTorch.

    Returns:
        `mean` and `std`, the population deviation, of the estimates.

    Raises `TypeError`/`ValueError` for other values, NaN, and features of another length.
    """
    check_pair(features, reference)
    check_size("subsets", subsets)
    check_integer("subset_size", subset_size, 2, min(len(features), len(reference)))
    check_generator("generator", generator)
    estimates = torch.tensor(
        [
            unbiased_discrepancy(*(random_rows(x, subset_size, generator).double() for x in (features, reference)))
            for _ in range(subsets)
        ],
        dtype=torch.double,
    )
    return {"mean": estimates.mean().item(), "std": estimates.std(correction=0).item()}


def unbiased_discrepancy(features: torch.Tensor, reference: torch.Tensor) -> float:
    """The unbiased estimate of the squared discrepancy between features `(n, F)` and `(n, F)` in float64."""
    count, length = features.shape

    def kernel(x, y):
        return (x @ y.T / length + 1).pow(3)

    within = sum((k.sum() - k.trace()) / (count * (count - 1)) for k in (kernel(x, x) for x in (features, reference)))
    return (within - 2 * kernel(features, reference).mean()).item()


@torch.no_grad()
def cmmd(features: torch.Tensor, reference: torch.Tensor) -> float:
    """
    CMMD (Jayasumana et al. 2024, section 4): 1000 × the squared maximum mean discrepancy between CLIP embeddings of
    images, `(N, F)` and `(M, F)`, with the kernel exp(−‖x − y‖² / (2·10²)), by the biased estimator of the authors'
    code, in float64.

    The embeddings are scaled to unit length, as there. Raises `TypeError`/`ValueError` for other shapes, NaN, and
    embeddings of another length or of norm 0.
    """
    check_pair(features, reference)
    x, y = unit_vectors("features", features), unit_vectors("reference", reference)
    return CMMD_SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def unit_vectors(name: str, embeddings: torch.Tensor) -> torch.Tensor:
    norms = embeddings.double().norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"{name} must not be 0, got {int((norms == 0).sum())} of {len(norms)} embeddings that are")
    return embeddings / norms


def mean_kernel(features: torch.Tensor, others: torch.Tensor) -> float:
    """The mean over all pairs of the kernel of [`cmmd`]."""
    total = sum(
        (squared_distances(rows, columns) / (-2 * CMMD_SIGMA**2)).exp().sum().item()
        for rows in features.split(ROWS)
        for columns in others.split(COLUMNS)
    )
    return total / (len(features) * len(others))
