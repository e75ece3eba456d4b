"""Metrics of generated and reconstructed pictures."""

import torch


def psnr(pixels: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of every image `(B, 3, height, width)` in [-1, 1], in dB: `(B,)`.

    Both are compared as the 8-bit images that they are saved as. Equal images have 100 dB, not infinity, so that
    means over images stay finite.
    """
    images, others = ((x.float() * 127.5 + 127.5).clamp(0, 255).round() for x in (pixels, reconstructions))
    squared_error = ((images - others) / 255).square().flatten(1).mean(dim=1)
    return -10 * squared_error.clamp(min=1e-10).log10()


def frechet_distance(features: torch.Tensor, other_features: torch.Tensor) -> float:
    """
    Fréchet distance of two Gaussians fitted to features `(N, F)` and `(M, F)`, N, M ≥ 2 (Heusel et al. 2017, eq. 6):

        ‖μ − μ'‖² + tr(Σ + Σ' − 2·(Σ Σ')^½)

    in double precision, with unbiased covariances. The root has the trace of (Σ^½ Σ' Σ^½)^½, which is symmetric.
    """
    means, covariances = zip(*((f.double().mean(dim=0), f.double().T.cov()) for f in (features, other_features)))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    trace = covariances[0].trace() + covariances[1].trace() - 2 * trace_of_root
    return ((means[0] - means[1]).square().sum() + trace).item()
