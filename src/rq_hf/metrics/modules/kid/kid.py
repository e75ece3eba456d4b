"""Kernel Inception distance: the squared maximum mean discrepancy with a cubic kernel, unbiased.

See `rq_hf.metrics.kernel_inception_distance`.
"""

import datasets
import evaluate
import torch

from rq_hf import metrics

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
        info = evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )
        info.format = "torch"  # which MetricInfo accepts for single numbers only
        return info

    def _compute(
        self, predictions, *, reference, subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        found = metrics.kernel_inception_distance(
            predictions, reference, subsets=subsets, subset_size=subset_size, generator=generator
        )
        return {"kid": found["mean"], "kid_std": found["std"]}
