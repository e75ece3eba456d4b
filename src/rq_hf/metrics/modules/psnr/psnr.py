"""Peak signal-to-noise ratio of images, in dB, averaged over the images.

Both are rounded to 8 bits first. See `rq_hf.metrics.psnr`.
"""

import datasets
import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.reconstruction import check_pixels

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
        info = evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    name: datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
                    for name in ("predictions", "references")
                }
            ),
        )
        info.format = "torch"  # which MetricInfo accepts for single numbers only
        return info

    def _compute(self, predictions, references) -> dict[str, float]:
        check_pixels("predictions", predictions)
        check_pixels("references", references)
        batches = zip(predictions.split(64), references.split(64))
        return {"psnr": torch.cat([metrics.psnr(*batch) for batch in batches]).mean().item()}
