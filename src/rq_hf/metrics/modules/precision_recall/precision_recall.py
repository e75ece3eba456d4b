"""Improved precision and recall, by nearest neighbours among features.

See `rq_hf.metrics.precision_recall`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{kynkaanniemi2019improved,
  title = {Improved Precision and Recall Metric for Assessing Generative Models},
  author = {Kynkäänniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}
"""
INPUTS = """
Args:
    predictions: features `(N, F)` of the images.
    reference: features `(M, F)`, a torch.Tensor; best N = M.
    neighbours: k, of the k-th nearest neighbour; 3 unless given.

Returns:
    precision: share of the images near the reference, in [0, 1].
    recall: share of the reference near the images, in [0, 1].
"""


class PrecisionRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(self, predictions, *, reference, neighbours: int = 3) -> dict[str, float]:
        return metrics.precision_recall(predictions, reference, neighbours=neighbours)
