"""The Fréchet distance that infinitely many features would have, extrapolated from subsets.

See `rq_hf.metrics.frechet_distance_infinity`.
"""

import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{chong2020effectively,
  title = {Effectively Unbiased FID and Inception Score and Where to Find Them},
  author = {Chong, Min Jin and Forsyth, David},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2020}
}
"""
INPUTS = """
Args:
    predictions: features `(N, F)` of the images.
    reference: features `(M, F)`, a torch.Tensor.
    sizes: number of random subsets; 15 unless given. Their sizes are evenly spaced from `smallest` to N.
    smallest: 5000 unless given; less than N.
    seed: of the subsets; 0 unless given.

Returns:
    fd_infinity: where the line through the distances against 1/size has 1/size = 0.
    slope: of the line.
    sizes, distances: its points.
"""


class FDInfinity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(
        self, predictions, *, reference, sizes: int = 15, smallest: int = 5000, seed: int = 0
    ) -> dict[str, float | list[int] | list[float]]:
        generator = torch.Generator().manual_seed(seed)
        return metrics.frechet_distance_infinity(
            predictions, reference, sizes=sizes, smallest=smallest, generator=generator
        )
