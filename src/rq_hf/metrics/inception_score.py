"""Inception score."""

import torch

from ..argument_checks import check_choice, check_finite, check_floating, check_integer, check_values
from .subsets import check_generator, random_rows

CORRECTIONS = {"population": 0, "sample": 1}


@torch.no_grad()
def inception_score(
    logits: torch.Tensor, *, splits: int = 10, deviation: str = "population", shuffle: torch.Generator | None = None
) -> dict[str, float]:
    """
    Inception score (Salimans et al. 2016, section 4): exp of the mean divergence of the class probabilities p(y|x)
    from their mean p(y), for each of several equal parts of the images, in float64.

    Args:
        logits: `(N, classes)`, N ≥ 2: logits, or logarithms of probabilities; −inf for a probability of 0.
        splits: number of parts n, in [1, N]. Part j has the images from j·N//n to (j + 1)·N//n.
        deviation: `"population"` divides by the number of parts (Salimans et al.), `"sample"` by one less.
        shuffle: on the CPU, shuffles the images first; `None` keeps their order.

    Returns:
        `mean` and `std` of the scores of the parts. The sample deviation of one part is NaN.

    Raises `TypeError`/`ValueError` for other values, and logits without probabilities.
    """
    check_floating("logits", logits, "N", "classes")
    check_values("logits", logits)
    check_finite("logits", logits.amax(dim=1, keepdim=True))
    check_choice("deviation", deviation, list(CORRECTIONS))
    if len(logits) < 2:
        raise ValueError(f"logits must have at least 2 rows, got {len(logits)}")
    check_integer("splits", splits, 1, len(logits))
    check_generator("shuffle", shuffle)
    if shuffle is not None:
        logits = random_rows(logits, len(logits), shuffle)
    bounds = [j * len(logits) // splits for j in range(splits + 1)]
    scores = torch.stack([score(logits[start:stop]) for start, stop in zip(bounds, bounds[1:])])
    mean, square = scores.mean(), (scores - scores.mean()).square().sum()
    return {"mean": mean.item(), "std": (square / (splits - CORRECTIONS[deviation])).sqrt().item()}


def score(logits: torch.Tensor) -> torch.Tensor:
    """exp(H(y) − H(y|x)), which is the mean divergence written with entropies."""
    probabilities = logits.double().softmax(dim=1)
    entropy_of_mean = torch.special.entr(probabilities.mean(dim=0)).sum()
    return (entropy_of_mean - torch.special.entr(probabilities).sum(dim=1).mean()).exp()
