"""Fréchet distance between sets of features."""

import torch

from ..argument_checks import check_finite, check_floating


def frechet_distance(features: torch.Tensor, other_features: torch.Tensor) -> float:
    """
    Fréchet distance between Gaussians fitted to features `(N, F)` and `(M, F)`, N, M ≥ 2 (Heusel et al. 2017, eq. 6):

        ‖μ − μ'‖² + tr(Σ + Σ' − 2·(Σ Σ')^½)

    in float64, with unbiased covariances. The root has the same trace as (Σ^½ Σ' Σ^½)^½, which is symmetric.
    """
    check_features("features", features)
    check_features("other_features", other_features)
    if features.shape[1] != other_features.shape[1]:
        raise ValueError(
            "features and other_features must have the same number of columns, "
            f"got {features.shape[1]} and {other_features.shape[1]}"
        )
    means, covariances = zip(*((f.double().mean(dim=0), f.double().T.cov()) for f in (features, other_features)))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    trace = covariances[0].trace() + covariances[1].trace() - 2 * trace_of_root
    return ((means[0] - means[1]).square().sum() + trace).item()


def check_features(name: str, features: torch.Tensor) -> None:
    """Raises `TypeError`/`ValueError` unless these are at least two rows of finite numbers."""
    check_floating(name, features, "N", "F")
    if len(features) < 2:
        raise ValueError(f"{name} must have at least 2 rows, got {len(features)}")
    check_finite(name, features)
