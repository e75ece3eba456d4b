import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rq_hf import CIFAR10_CLASSIFIER
from rq_hf.data import ImageCollator, load_image_dataset
from rq_hf.metrics import SmallClassifier

CIFAR10 = Path(os.environ.get("RQ_HF_CIFAR10", Path(__file__).parents[3] / "shared" / "data" / "cifar10"))
HELD_OUT = "train-00004-of-00005.parquet"


@pytest.fixture(scope="module")
def shipped():
    return SmallClassifier.from_pretrained(CIFAR10_CLASSIFIER)


@pytest.fixture
def pixels():
    return torch.rand(5, 3, 32, 32) * 2 - 1


@torch.no_grad()
def test_logits_are_those_of_the_features(shipped, pixels):
    features = shipped.features(pixels)
    assert features.shape == (5, shipped.num_features)
    assert features.dtype == torch.float32
    logits = shipped(pixels)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(logits, features @ shipped.classifier.weight.T + shipped.classifier.bias)


@torch.no_grad()
def test_an_image_has_the_same_features_in_any_batch(shipped, pixels):
    features = shipped.features(pixels)
    for image, expected in zip(pixels.split(1), features.split(1)):
        torch.testing.assert_close(shipped.features(image), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(shipped.features(pixels), features)


def test_shipped_weights(shipped):
    assert not shipped.training
    assert sum(parameter.numel() for parameter in shipped.parameters()) == 1_332_266
    assert all(tensor.isfinite().all() for tensor in shipped.state_dict().values())
    file = Path(CIFAR10_CLASSIFIER) / "model.safetensors"
    assert file.stat().st_size <= 3e6
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16, torch.int64}
    assert (Path(CIFAR10_CLASSIFIER) / "README.md").exists()


def test_saves_and_loads_with_any_number_of_classes(tmp_path, pixels):
    model = SmallClassifier(num_classes=3).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"num_classes": 3}
    loaded = SmallClassifier.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model(pixels))


def test_refuses_a_file_that_lacks_weights(tmp_path):
    SmallClassifier().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        SmallClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 64, 64), ValueError, r"pixels must have the shape \(B, 3, 32, 32\), got \(2, 3, 64, 64\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"pixels must have the shape \(B, 3, 32, 32\), got \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32).byte(), TypeError, r"pixels must be floating point, got torch\.uint8"),
    ],
    ids=["size", "channels", "type"],
)
def test_refuses_other_images(shipped, images, error, message):
    with pytest.raises(error, match=message):
        shipped(images)


@pytest.mark.slow
@pytest.mark.skipif(
    not (CIFAR10 / HELD_OUT).exists(), reason=f"no {HELD_OUT} in {CIFAR10}; RQ_HF_CIFAR10 names a folder with it"
)
@torch.no_grad()
def test_classifies_held_out_images(shipped):
    dataset = load_image_dataset(data_files=str(CIFAR10 / HELD_OUT), image_column="img").select(range(1000))
    batch = ImageCollator("img", 32, label_column="label")(list(dataset))
    accuracy = (shipped(batch["pixels"]).argmax(dim=-1) == batch["cond_ids"].squeeze(1)).float().mean()
    assert accuracy >= 0.88
