"""Rejection sampling: of several candidates per image, keep those that a scorer prefers (section 4.2)."""

from collections.abc import Callable

import torch

from ..argument_checks import check_callable, check_size

Scorer = Callable[[torch.Tensor, list | None], torch.Tensor]


def check_candidates(scorer: Scorer | None, num_candidates: int) -> None:
    """Raises `ValueError`/`TypeError` for candidates without a scorer, the reverse, or no number of at least 1."""
    check_size("num_candidates", num_candidates)
    check_callable("scorer", scorer)
    if (scorer is None) != (num_candidates == 1):
        raise ValueError(
            "scorer requires num_candidates > 1, and vice versa; got "
            f"{'no scorer' if scorer is None else 'a scorer'} and {num_candidates=}"
        )


def score_images(scorer: Scorer, images: torch.Tensor, conditions: list | None) -> torch.Tensor:
    """Scores `(B,)`, on the CPU, of images `(B, 3, height, width)` in [0, 1]; `ValueError` for any other result."""
    scores = scorer(images, conditions)
    is_number_per_image = (
        torch.is_tensor(scores)
        and scores.shape == (len(images),)
        and not scores.is_complex()
        and scores.dtype != torch.bool
        and not scores.isnan().any()
    )
    if not is_number_per_image:
        raise ValueError(f"scorer must return one number per image ({len(images)}), got {scores}")
    return scores.cpu()


def select_best(scores: torch.Tensor, per_condition: int, num_images: int) -> torch.Tensor:
    """Of every `per_condition` scores in a row the indices of the `num_images` highest, highest first."""
    best = scores.view(-1, per_condition).topk(num_images, dim=-1).indices  # (P, num_images)
    return (best + per_condition * torch.arange(len(best))[:, None]).flatten()
