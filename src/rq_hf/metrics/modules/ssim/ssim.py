"""Structural similarity of images, averaged over the images.

Both are rounded to 8 bits first. See `rq_hf.metrics.ssim`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import mean_over_images, metric_info

CITATION = """
@article{wang2004image,
  title = {Image Quality Assessment: From Error Visibility to Structural Similarity},
  author = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal = {IEEE Transactions on Image Processing},
  year = {2004}
}
"""
INPUTS = """
Args:
    predictions: images `(N, channels, height, width)` in [-1, 1], all of one size.
    references: the images that they should equal.

Returns:
    ssim: at most 1.
"""


class SSIM(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=3, references=3)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"ssim": mean_over_images(metrics.ssim, predictions, references, 64)}
