"""The Inception network, against recorded runs of the authors' evaluation (see `golden.py`) and with its real weights.

RQ_HF_INCEPTION names the file pt_inception-2015-12-05-6726825d.pth of pytorch-fid. RQ_HF_CIFAR10_BATCH names the file
data_batch_1.bin of cifar-10-binary.tar.gz.
"""

import os

import golden
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rq_hf.files import checksum
from rq_hf.metrics import load_feature_network
from rq_hf.metrics.feature_networks import INCEPTION, INCEPTION_SHA256
from rq_hf.metrics.inception import FIDInception

RECORDED = golden.FOLDER / "metrics" / "inception_recipe.safetensors"
CASES = sorted({name.split("/")[1] for name in load_file(RECORDED)} if RECORDED.is_file() else ())
REAL_FILE = os.environ.get("RQ_HF_INCEPTION")
CIFAR10_BATCH = os.environ.get("RQ_HF_CIFAR10_BATCH")
CIFAR10_LABELS = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # of the first ten images
# Of the first 100 images: tests/tf1/numerical_precision/test_metric_isc_fidelity.py in torch-fidelity 0.4.0.
CIFAR10_INCEPTION_SCORE = 4.51089784587268


@golden.require("metrics/inception_recipe.safetensors")
@pytest.mark.parametrize("case", CASES)
def test_features_and_logits_are_those_recorded(inception, case):
    recorded = load_file(RECORDED)
    output = inception(recorded[f"in/{case}/images"])
    torch.testing.assert_close(output.features, recorded[f"out/{case}/pool_features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, recorded[f"out/{case}/logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("fc.bias"), r"lacks fc\.bias and 0 more of 472 weights"),
        (
            lambda weights: weights.update({"fc.weight": torch.zeros(1000, 2048)}),
            r"fc\.weight in .* must have the shape \(1008, 2048\), got \(1000, 2048\)",
        ),
    ],
    ids=["missing", "of ImageNet's classes"],
)
def test_refuses_other_weights(tmp_path, inception_file, change, message):
    weights = torch.load(inception_file[0], mmap=True)
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        FIDInception.from_file(tmp_path / "weights.pth")


def test_refuses_pixels_of_another_size():
    with torch.device("meta"), pytest.raises(ValueError, match=r"\(B, 3, 299, 299\), got \(1, 3, 256, 256\)"):
        FIDInception()(torch.zeros(1, 3, 256, 256))


@pytest.mark.skipif(REAL_FILE is None, reason="RQ_HF_INCEPTION names no file of the real weights")
def test_real_weights():
    assert checksum(REAL_FILE) == INCEPTION_SHA256
    network = load_feature_network("torch-fidelity", REAL_FILE)
    assert (network.name, network.distance_name) == (INCEPTION, "FID (torch-fidelity)")


@pytest.mark.skipif(
    None in (REAL_FILE, CIFAR10_BATCH),
    reason="RQ_HF_INCEPTION and RQ_HF_CIFAR10_BATCH name no files of the real weights and of CIFAR-10",
)
def test_real_weights_give_the_published_inception_score():
    """The fingerprint of the whole way from 8 bits to logits: the Inception Score, in 10 splits, of the first 100
    training images of CIFAR-10, shuffled as by torch-fidelity, whose own test demands the same number to 1e-4."""
    records = np.fromfile(CIFAR10_BATCH, np.uint8, 100 * 3073).reshape(100, 3073)
    assert records[:10, 0].tolist() == CIFAR10_LABELS
    images = torch.from_numpy(records[:, 1:].reshape(100, 3, 32, 32))
    network = load_feature_network("torch-fidelity", REAL_FILE)
    logits = torch.cat([network(batch).logits for batch in images.split(25)])
    logits = logits[np.random.RandomState(2020).permutation(100)].double()
    scores = []
    for chunk in logits.split(10):
        own, marginal = chunk.softmax(dim=1), chunk.softmax(dim=1).mean(dim=0)
        scores.append((own * (chunk.log_softmax(dim=1) - marginal.log())).sum(dim=1).mean().exp().item())
    assert np.mean(scores) == pytest.approx(CIFAR10_INCEPTION_SCORE, abs=1e-4)
