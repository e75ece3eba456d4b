"""The learned perceptual distance of images (VGG16), averaged over the images.

See `rq_hf.metrics.LPIPS`.
"""

import datasets
import evaluate
import torch

from rq_hf import metrics
from rq_hf.metrics.reconstruction import check_pixels

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

    def _compute(self, predictions, references, *, vgg: str, heads: str) -> dict[str, float]:
        check_pixels("predictions", predictions)
        check_pixels("references", references)
        distance = metrics.LPIPS.from_pretrained(vgg, heads)
        with torch.no_grad():
            distances = [distance(*batch) for batch in zip(predictions.split(16), references.split(16))]
        return {"lpips": torch.cat(distances).mean().item()}
