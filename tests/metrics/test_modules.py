"""The modules for the library evaluate, loaded offline, give what the functions give."""

import math
from pathlib import Path

import evaluate
import pytest
import torch

from rq_hf import metrics

MODULES = Path(metrics.MODULES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(str(MODULES / name), cache_dir=str(tmp_path))


@pytest.fixture
def features():
    return torch.randn(40, 5, generator=seeded())


@pytest.fixture
def reference():
    return torch.randn(30, 5, generator=seeded(1)) + 1


@pytest.fixture
def images():
    return torch.rand(2, 3, 3, 16, 18, generator=seeded()) * 2 - 1


def test_all_load_and_describe_themselves(load):
    names = sorted(path.name for path in MODULES.iterdir() if path.name != "__pycache__")
    assert len(names) == 11
    for name in names:
        module = load(name)
        assert module.name == name
        assert module.citation.strip().startswith("@") and "predictions:" in module.inputs_description
        assert module.description.strip()


def test_fid_of_batches(load, features, reference):
    fid, expected = load("fid"), metrics.frechet_distance(features, reference)
    for batch in features.split(15):
        fid.add_batch(predictions=batch)
    assert fid.compute(reference=reference) == {"frechet_distance": pytest.approx(expected, rel=1e-9)}


def test_fid_to_a_file_of_statistics(load, tmp_path, features, reference):
    statistics = metrics.FeatureStatistics(
        metrics.FeatureMoments.of(reference),
        {
            "dataset": "noise",
            "split": "train",
            "transform": "none",
            "count": len(reference),
            "network": "identity",
            "protocol": "none",
            "network_sha256": "0" * 64,
            "uint8_rule": "stored",
        },
    )
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    found = load("fid").compute(predictions=features, reference=str(path), network="identity")
    assert found == {"frechet_distance": pytest.approx(metrics.frechet_distance(features, reference), rel=1e-9)}
    with pytest.raises(ValueError, match="says network .*identity.*, got .*inception"):
        load("fid").compute(predictions=features, reference=str(path), network="inception")
    with pytest.raises(TypeError, match="network: only for a reference that is a file"):
        load("fid").compute(predictions=features, reference=reference, network="identity")


def test_kid(load, features, reference):
    expected = metrics.kernel_inception_distance(features, reference, subsets=3, subset_size=9, generator=seeded(7))
    found = load("kid").compute(predictions=features, reference=reference, subsets=3, subset_size=9, seed=7)
    assert found == {"kid": expected["mean"], "kid_std": expected["std"]}


def test_fd_infinity(load, features, reference):
    expected = metrics.frechet_distance_infinity(features, reference, sizes=4, smallest=10, generator=seeded(7))
    found = load("fd_infinity").compute(predictions=features, reference=reference, sizes=4, smallest=10, seed=7)
    assert found == expected


def test_inception_score(load, features):
    expected = metrics.inception_score(features, splits=4, deviation="sample")
    found = load("inception_score").compute(predictions=features, splits=4, deviation="sample")
    assert found == {"inception_score": expected["mean"], "inception_score_std": expected["std"]}
    shuffled = load("inception_score").compute(predictions=features, splits=4, seed=1)
    assert shuffled["inception_score"] == metrics.inception_score(features, splits=4, shuffle=seeded(1))["mean"]


def test_precision_recall(load, features, reference):
    found = load("precision_recall").compute(predictions=features, reference=reference, neighbours=2)
    assert found == metrics.precision_recall(features, reference, neighbours=2)


def test_clip_score(load, features):
    expected = metrics.clip_score(features, features.flip(1)).mean().item()
    assert load("clip_score").compute(predictions=features, references=features.flip(1)) == {"clip_score": expected}


def test_cmmd(load, features, reference):
    found = load("cmmd").compute(predictions=features, reference=reference)
    assert found == {"cmmd": metrics.cmmd(features, reference)}


def test_codebook_usage(load):
    codes = torch.tensor([[[[0, 1], [2, 1]], [[0, 1], [2, 1]]]])
    found = load("codebook_usage").compute(predictions=codes, codebook_size=4)
    assert found == {"usage": [0.5, 0.25], "perplexity": [pytest.approx(2), 1]}


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_of_pairs_of_images(load, images, name):
    expected = getattr(metrics, name)(*images).mean().item()
    found = load(name).compute(predictions=images[0], references=images[1])
    assert found == {name: pytest.approx(expected, rel=1e-6)}
    for wrong in (3 * images[0], math.nan * images[0]):
        with pytest.raises(ValueError, match=r"predictions must lie in \[-1, 1\], got values from"):
            load(name).compute(predictions=wrong, references=images[1])


def test_lpips(load, images, tmp_path):
    lpips = metrics.LPIPS()
    for head in lpips.heads:
        head.weight.abs_()
    weights = lpips.state_dict()
    torch.save({n: w for n, w in weights.items() if n.startswith("features.")}, tmp_path / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": head.weight for i, head in enumerate(lpips.heads)}, tmp_path / "heads.pth")
    sources = {"vgg": str(tmp_path / "vgg.pth"), "heads": str(tmp_path / "heads.pth")}
    found = load("lpips").compute(predictions=images[0], references=images[1], **sources)
    assert found == {"lpips": pytest.approx(lpips(*images).mean().item(), rel=1e-5)}


def test_refuse_rows_of_different_lengths_and_a_missing_reference(load, features):
    with pytest.raises(TypeError, match="features must be a torch.Tensor"):
        load("cmmd").compute(predictions=[[1.0, 2.0], [3.0]], reference=features)
    with pytest.raises(TypeError, match="'reference'"):
        load("cmmd").compute(predictions=features, references=features)
