"""What the modules for the library evaluate have in common."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import datasets
import torch

from .reconstruction import check_pixels

if TYPE_CHECKING:
    import evaluate


def metric_info(
    description: str, citation: str, inputs: str, *, dtype: str = "float32", **dimensions: int
) -> "evaluate.MetricInfo":
    """
    Information on a metric that takes and gives tensors.

    Args:
        description, citation, inputs: texts for the user.
        dtype: of the numbers that it takes.
        dimensions: of an example in each of its columns, by name: 1 for features, 3 for images.
    """
    import evaluate  # which is optional

    columns = {}
    for name, count in dimensions.items():
        columns[name] = datasets.Value(dtype)
        for _ in range(count):
            columns[name] = datasets.Sequence(columns[name])
    info = evaluate.MetricInfo(
        description=description, citation=citation, inputs_description=inputs, features=datasets.Features(columns)
    )
    info.format = "torch"  # which MetricInfo accepts for single numbers only
    return info


def mean_over_images(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    predictions: torch.Tensor,
    references: torch.Tensor,
    batch_size: int,
) -> float:
    """The mean of `measure`, which gives `(B,)`, over pairs of images `(N, channels, height, width)` in [-1, 1].
    Raises `TypeError`/`ValueError` for other images."""
    check_pixels("predictions", predictions)
    check_pixels("references", references)
    batches = zip(predictions.split(batch_size), references.split(batch_size))
    return torch.cat([measure(*batch) for batch in batches]).mean().item()
