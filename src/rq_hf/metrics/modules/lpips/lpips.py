"""The learned perceptual distance of images (VGG16), averaged over the images.

See `rq_hf.metrics.LPIPS`.
"""

import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.module_info import mean_over_images, metric_info

CITATION = """
@inproceedings{zhang2018unreasonable,
  title = {The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
  author = {Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2018}
}
"""
INPUTS = """
Args:
    predictions: images `(N, 3, height, width)` in [-1, 1], all of one size.
    references: the images that they should equal.
    vgg, heads: the weights, as for `rq_hf.metrics.LPIPS.from_pretrained`.

Returns:
    lpips: at least 0.
"""


class LPIPS(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=3, references=3)

    def _compute(self, predictions, references, *, vgg: str, heads: str) -> dict[str, float]:
        distance = metrics.LPIPS.from_pretrained(vgg, heads)
        with torch.no_grad():
            return {"lpips": mean_over_images(distance, predictions, references, 16)}
