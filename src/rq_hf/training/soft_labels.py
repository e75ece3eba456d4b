"""Soft labels softmax(−‖r − e(k)‖²/τ) (Lee et al., CVPR 2022, section 3.2.3): over how many codewords they spread, and
a τ for a codebook. τ has the unit of squared distance, so that the paper's 0.5 suits the paper's codebooks only."""

import math

import torch

from ..models import ResidualQuantizer

# Measured in docs/training.md.
EFFECTIVE_CODEWORDS = 1.5
MAX_VECTORS = 1024


def effective_codewords(quantizer: ResidualQuantizer, residuals: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(mean entropy) of the soft labels of residuals `(..., D, C)` at each depth, `(D,)`: from 1, hard labels, to
    K, uniform ones."""
    return mean_entropy(squared_distances(quantizer, residuals), temperature).exp()


@torch.no_grad()
def choose_soft_label_temperature(
    quantizer: ResidualQuantizer, vectors: torch.Tensor, target: float = EFFECTIVE_CODEWORDS
) -> float:
    """
    The τ, to two digits, at which the soft labels of vectors `(..., C)` have `target` effective codewords: exp of the
    mean entropy over all depths.

    Raises `ValueError` for a target out of (1, K).
    """
    if not 1 < target < quantizer.codebook_size:
        raise ValueError(f"target must lie in (1, {quantizer.codebook_size}), got {target}")
    distances = squared_distances(quantizer, quantizer.encode(evenly_spaced(vectors)).residuals)
    scale = distances.mean().log().item()
    low, high = scale - 40, scale + 40  # bounds of log τ; the entropy grows with it
    while high - low > 1e-3:
        middle = (low + high) / 2
        is_below = mean_entropy(distances, math.exp(middle)).mean() < math.log(target)
        low, high = (middle, high) if is_below else (low, middle)
    return float(f"{math.exp(low):.2g}")


@torch.no_grad()
def describe_soft_labels(quantizer: ResidualQuantizer, vectors: torch.Tensor, temperature: float) -> str:
    """The effective codewords of soft labels of vectors `(..., C)` at each depth, in a sentence; a second one warns
    about soft labels that are nearly uniform at a depth, or hard at all."""
    residuals = quantizer.encode(evenly_spaced(vectors)).residuals
    effective = effective_codewords(quantizer, residuals, temperature).tolist()
    size = quantizer.codebook_size
    text = (
        f"soft labels of temperature {temperature} have {' / '.join(f'{n:.1f}' for n in effective)} effective "
        f"codewords of {size} at depths 1 to {len(effective)}."
    )
    if max(effective) > size / 2:
        text += " WARNING: such labels are nearly uniform and teach noise; a lower --soft_label_temperature helps."
    if max(effective) < 1.01:
        text += " WARNING: such labels are hard; --soft_label_temperature is in units of squared distance."
    return text


def evenly_spaced(vectors: torch.Tensor) -> torch.Tensor:
    """At most [`MAX_VECTORS`] of the vectors `(..., C)`: `(N, C)`."""
    vectors = vectors.reshape(-1, vectors.shape[-1])
    count = min(len(vectors), MAX_VECTORS)
    return vectors[torch.linspace(0, len(vectors) - 1, count, device=vectors.device).long()]


def squared_distances(quantizer: ResidualQuantizer, residuals: torch.Tensor) -> torch.Tensor:
    """‖r − e(k)‖² of residuals `(..., D, C)`: `(D, N, K)`."""
    residuals = residuals.float().reshape(-1, *residuals.shape[-2:])
    return torch.stack(
        [torch.cdist(residuals[:, d], quantizer.codebook_at(d)).square() for d in range(residuals.shape[1])]
    )


def mean_entropy(distances: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy in nats of softmax(−distances/τ), mean over the vectors: `(D, N, K)` -> `(D,)`."""
    log_probs = torch.log_softmax(distances / -temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=-1)
