"""Kernel Inception distance: the squared maximum mean discrepancy with a cubic kernel, unbiased.

See `rq_hf.metrics.kernel_inception_distance`.
"""

import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{binkowski2018demystifying,
  title = {Demystifying MMD GANs},
  author = {Bińkowski, Mikołaj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
  booktitle = {International Conference on Learning Representations},
  year = {2018}
}
"""
INPUTS = """
Args:
    predictions: features `(N, F)` of the images.
    reference: features `(M, F)`, a torch.Tensor.
    subsets: number of random subsets of both; 100 unless given.
    subset_size: their size, at most N and M; 1000 unless given.
    seed: of the subsets; 0 unless given.

Returns:
    kid: the mean over the subsets.
    kid_std: the population deviation over the subsets.
"""


class KID(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(
        self, predictions, *, reference, subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        found = metrics.kernel_inception_distance(
            predictions, reference, subsets=subsets, subset_size=subset_size, generator=generator
        )
        return {"kid": found["mean"], "kid_std": found["std"]}
