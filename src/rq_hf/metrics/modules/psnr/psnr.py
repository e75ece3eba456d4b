"""Peak signal-to-noise ratio of images, in dB, averaged over the images.

Both are rounded to 8 bits first. See `rq_hf.metrics.psnr`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import mean_over_images, metric_info

CITATION = """
@book{gonzalez2018digital,
  title = {Digital Image Processing},
  author = {Gonzalez, Rafael C. and Woods, Richard E.},
  publisher = {Pearson},
  year = {2018}
}
"""
INPUTS = """
Args:
    predictions: images `(N, channels, height, width)` in [-1, 1], all of one size.
    references: the images that they should equal.

Returns:
    psnr: in dB, at most 100.
"""


class PSNR(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=3, references=3)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"psnr": mean_over_images(metrics.psnr, predictions, references, 64)}
