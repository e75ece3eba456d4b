"""Fréchet distance between sets of features."""

import torch
from huggingface_hub.utils import logging

from ..argument_checks import check_integer
from .moments import FeatureMoments, check_features, check_same_length, moments_of
from .subsets import check_generator, random_rows

SMALLEST_EIGENVALUE = -1e-5  # relative to the largest, of a covariance that was rounded to float32

logger = logging.get_logger(__name__)


def frechet_distance(features: torch.Tensor | FeatureMoments, other_features: torch.Tensor | FeatureMoments) -> float:
    """
    Fréchet distance between Gaussians fitted to features `(N, F)` and `(M, F)`, N, M ≥ 2 (Heusel et al. 2017, eq. 6):

        ‖μ − μ'‖² + tr(Σ + Σ' − 2·(Σ Σ')^½)

    in float64, with unbiased covariances. Either may be given by its moments. The distance is called FID for features
    of the FID Inception network only.

    With Σ = L Lᵀ, the root has the same trace as (Lᵀ Σ' L)^½, which is symmetric. Σ is the covariance of lower rank,
    and L has as many columns, so that only rounding makes an eigenvalue 0.

    Raises `TypeError`/`ValueError` unless both are at least two rows of finite numbers, of the same length. Warns of a
    covariance without full rank, which makes the distance too large.
    """
    moments = [moments_of("features", features), moments_of("other_features", other_features)]
    check_same_length("features", moments[0].num_features, "other_features", moments[1].num_features)
    ranks = [rank_of("features", moments[0]), rank_of("other_features", moments[1])]
    (rank, lower), (_, higher) = sorted(zip(ranks, moments), key=lambda pair: pair[0])
    return distance_between(lower, factor_of(lower.covariance, rank), higher)


def frechet_distance_infinity(
    features: torch.Tensor,
    reference: torch.Tensor | FeatureMoments,
    *,
    sizes: int = 15,
    smallest: int = 5000,
    generator: torch.Generator | None = None,
) -> dict[str, float | list[int] | list[float]]:
    """
    The Fréchet distance that infinitely many features would have (Chong and Forsyth 2020, section 3): the intercept of
    the line, fitted by least squares, through the distances of random subsets against 1/size.

    Args:
        features: `(N, F)`.
        reference: `(M, F)`, M ≥ 2, or its moments.
        sizes: number of subsets. Their sizes are evenly spaced from `smallest` to N, and rounded down.
        smallest: at least 2 and less than N.
        generator: on the CPU, of the subsets; `None` for the one of PyTorch.

    Returns:
        `fd_infinity`; `slope` of the line; and its points, `sizes` and `distances`.

    Raises `TypeError`/`ValueError` for other values, and for features like those that [`frechet_distance`] refuses.
    """
    check_features("features", features, at_least=3)
    reference = moments_of("reference", reference)
    check_same_length("features", features.shape[1], "reference", reference.num_features)
    check_integer("sizes", sizes, 2, len(features))
    check_integer("smallest", smallest, 2, len(features) - 1)
    check_generator("generator", generator)
    counts = torch.linspace(smallest, len(features), sizes, dtype=torch.double).long().tolist()
    factor = factor_of(reference.covariance, rank_of("reference", reference))
    distances = []
    for count in counts:
        subset = FeatureMoments.of(random_rows(features, count, generator))
        if count == smallest:
            rank_of("the smallest subset of features", subset)
        distances.append(distance_between(reference, factor, subset))
    inverse, points = 1 / torch.tensor(counts, dtype=torch.double), torch.tensor(distances, dtype=torch.double)
    centered = inverse - inverse.mean()
    slope = (centered * points).sum() / centered.square().sum()
    intercept = points.mean() - slope * inverse.mean()
    return {"fd_infinity": intercept.item(), "slope": slope.item(), "sizes": counts, "distances": distances}


def rank_of(name: str, moments: FeatureMoments) -> int:
    """
    The rank of the covariance; warns unless it is full.

    Raises `ValueError` for one with negative eigenvalues.
    """
    values = torch.linalg.eigvalsh(moments.covariance)
    lowest, highest = values[0].item(), values[-1].item()
    if lowest < SMALLEST_EIGENVALUE * highest or highest < 0:
        raise ValueError(f"{name} must have a covariance without negative eigenvalues, got one of {lowest:.3g}")
    size = len(values)
    rank = int((values > 10 * size * torch.finfo(torch.double).eps * highest).sum())
    if rank < size:
        count = "unknown" if moments.count is None else moments.count
        logger.warning(
            f"{name}: the covariance of {size} features has rank {rank} (number of samples: {count}), which makes "
            f"the Fréchet distance too large; use many more than {size} samples"
        )
    return rank


def factor_of(covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """L `(F, rank)` with L Lᵀ = `covariance` `(F, F)`."""
    size = len(covariance)
    if rank == size:
        return torch.linalg.cholesky(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, size - rank :] * values[size - rank :].sqrt()


def distance_between(moments: FeatureMoments, factor: torch.Tensor, other: FeatureMoments) -> float:
    """The Fréchet distance; `factor` is the [`factor_of`] the first covariance."""
    product = factor.T @ other.covariance @ factor
    trace_of_root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    trace = moments.covariance.trace() + other.covariance.trace() - 2 * trace_of_root
    return ((moments.mean - other.mean).square().sum() + trace).item()
