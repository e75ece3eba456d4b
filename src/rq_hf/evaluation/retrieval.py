"""Retrieval: whether an image that is sampled for a prompt is closer to that prompt's own image than to all others."""

from collections.abc import Sequence

import torch

from ..argument_checks import check_floating, check_instance, check_items, check_size
from ..pipelines import MARPipeline, RQPipeline

# The two ways to compute a distance, of all candidates and of the prompt's own image, round differently.
TOLERANCE = 1e-4


def retrieval_ranks(
    pipe: RQPipeline | MARPipeline,
    prompts: Sequence[str],
    images: torch.Tensor,
    candidates: torch.Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    **sampling,
) -> torch.Tensor:
    """
    Ranks `(N,)` of the images of N prompts among the candidates, by L2 distance in pixels to one image that is sampled
    for each prompt: 1 means that no candidate is closer.

    Args:
        images: those of the prompts, `(N, 3, height, width)` in [0, 1].
        candidates: all images, with those of the prompts: `(M, 3, height, width)`.
        seed: of all sampled images together.
        batch_size: prompts that are sampled at a time; with another one, the same seed gives other images.
        sampling: further arguments of the pipeline.

    Raises `TypeError`/`ValueError` for images of other shapes.
    """
    check_instance("pipe", pipe, RQPipeline | MARPipeline)
    check_items("prompts", prompts)
    check_floating("candidates", candidates, "M", 3, "height", "width")
    check_floating("images", images, len(prompts), *candidates.shape[1:])
    check_size("batch_size", batch_size)
    generator, ranks = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        sampled = pipe(prompts[rows], generator=generator, output_type="pt", **sampling).images
        distances = torch.cdist(sampled.flatten(1), candidates.flatten(1))
        own = torch.linalg.vector_norm((sampled - images[rows]).flatten(1), dim=1, keepdim=True)
        ranks.append(1 + (distances < own * (1 - TOLERANCE)).sum(dim=1))
    return torch.cat(ranks)
