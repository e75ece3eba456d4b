"""How much of its codebook a tokenizer uses, at each depth.

See `rq_hf.metrics.codebook_usage`.
"""

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info

CITATION = """
@inproceedings{lee2022autoregressive,
  title = {Autoregressive Image Generation using Residual Quantization},
  author = {Lee, Doyup and Kim, Chiheon and Kim, Saehoon and Cho, Minsu and Han, Wook-Shin},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}
}
"""
INPUTS = """
Args:
    predictions: codes `(N, H, W, D)` of images.
    codebook_size: K; codes lie in [0, K).

Returns:
    usage: at each depth, the share of codes that occur, in [0, 1].
    perplexity: at each depth, exp of the entropy of the codes, in [1, K].
"""


class CodebookUsage(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, dtype="int64", predictions=3)

    def _compute(self, predictions, *, codebook_size: int) -> dict[str, list[float]]:
        usage = metrics.codebook_usage(metrics.count_codes(predictions, codebook_size))
        return {name: values.tolist() for name, values in usage.items()}
