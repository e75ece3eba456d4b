"""The mean cosine similarity of CLIP embeddings of images and of their prompts.

It is not scaled, and negative values count. See `rq_hf.metrics.clip_score`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{hessel2021clipscore,
  title = {CLIPScore: A Reference-free Evaluation Metric for Image Captioning},
  author = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2021}
}
"""
INPUTS = """
Args:
    predictions: embeddings `(N, F)` of the images.
    references: embeddings `(N, F)` of their prompts, by the same model.

Returns:
    clip_score: in [-1, 1].
"""


class CLIPScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1, references=1)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"clip_score": metrics.clip_score(predictions, references).mean().item()}
