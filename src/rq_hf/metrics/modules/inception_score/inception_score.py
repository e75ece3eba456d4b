"""Inception score: how sure a classifier is of each image, and how varied its classes are.

See `rq_hf.metrics.inception_score`.
"""

import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{salimans2016improved,
  title = {Improved Techniques for Training GANs},
  author = {Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2016}
}
"""
INPUTS = """
Args:
    predictions: logits `(N, classes)` of the images, or logarithms of probabilities.
    splits: number of parts of which the score is averaged; 10 unless given.
    deviation: "population" or "sample"; "population" unless given.
    seed: shuffles the images first; they keep their order unless given.

Returns:
    inception_score: the mean over the parts.
    inception_score_std: the deviation over the parts.
"""


class InceptionScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(
        self, predictions, *, splits: int = 10, deviation: str = "population", seed: int | None = None
    ) -> dict[str, float]:
        shuffle = None if seed is None else torch.Generator().manual_seed(seed)
        found = metrics.inception_score(predictions, splits=splits, deviation=deviation, shuffle=shuffle)
        return {"inception_score": found["mean"], "inception_score_std": found["std"]}
