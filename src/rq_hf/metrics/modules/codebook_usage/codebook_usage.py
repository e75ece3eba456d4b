"""How much of its codebook a tokenizer uses, at each depth.

See `rq_hf.metrics.codebook_usage`.
"""

import datasets
import evaluate

from rq_hf import metrics

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
        info = evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("int64"))))}
            ),
        )
        info.format = "torch"  # which MetricInfo accepts for single numbers only
        return info

    def _compute(self, predictions, *, codebook_size: int) -> dict[str, list[float]]:
        usage = metrics.codebook_usage(metrics.count_codes(predictions, codebook_size))
        return {name: values.tolist() for name, values in usage.items()}
