"""Fréchet distance between features of images and those of a reference.

It is called FID for pool features of the FID Inception network only. Of reconstructions and their originals it is the
rFID. See `rq_hf.metrics.frechet_distance`; with `rq_hf.metrics.FeatureMoments`, which keeps no features, that is the
way for many images.
"""

import os

import evaluate

from rq_hf import metrics
from rq_hf.metrics.module_info import metric_info
from rq_hf.metrics.statistics import FeatureStatistics

CITATION = """
@inproceedings{heusel2017gans,
  title = {GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
  author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}
"""
INPUTS = """
Args:
    predictions: features `(N, F)` of the images, N ≥ 2; best many more than F.
    reference: features `(M, F)`, a torch.Tensor; or a file of statistics, `.safetensors` or `.npz`.
    provenance: by name, what `rq_hf.metrics.FeatureStatistics.load` takes: what the file does not say, and what it
        must say, such as the network of the features: `**network.identity()`. Only with a file.

Returns:
    frechet_distance: a float.

Example:
    >>> fid = evaluate.load(f"{rq_hf.metrics.MODULES}/fid")
    >>> fid.compute(predictions=features, reference="train.safetensors", **network.identity())
"""


class FID(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(__doc__, CITATION, INPUTS, predictions=1)

    def _compute(self, predictions, *, reference, **provenance) -> dict[str, float]:
        if isinstance(reference, str | os.PathLike):
            reference = FeatureStatistics.load(reference, **provenance).moments
        elif provenance:
            raise TypeError(f"{', '.join(provenance)}: only for a reference that is a file of statistics")
        return {"frechet_distance": metrics.frechet_distance(predictions, reference)}
