"""CLIP maximum mean discrepancy: 1000 × the squared discrepancy with a Gaussian kernel.

See `rq_hf.metrics.cmmd`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{jayasumana2024rethinking,
  title = {Rethinking FID: Towards a Better Evaluation Metric for Image Generation},
  author = {Jayasumana, Sadeep and Ramalingam, Srikumar and Veit, Andreas and Glasner, Daniel
    and Chakrabarti, Ayan and Kumar, Sanjiv},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}
"""
INPUTS = """
Args:
    predictions: CLIP embeddings `(N, F)` of the images.
    reference: CLIP embeddings `(M, F)` of other images, a torch.Tensor.

Returns:
    cmmd: a float.
"""


class CMMD(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(self, predictions, *, reference) -> dict[str, float]:
        return {"cmmd": metrics.cmmd(predictions, reference)}
