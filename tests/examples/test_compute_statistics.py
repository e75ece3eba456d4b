import json
import runpy
import sys

import datasets
import numpy as np
import pytest
import torch
from processes import run_group
from scripts import EXAMPLES, run_example
from shapes import create_shapes, draw_shape, write_parquet, write_shapes
from transformers import Dinov2Config, Dinov2Model

from rq_hf.files import checksum
from rq_hf.images import to_pixels
from rq_hf.metrics.feature_networks import load_feature_network
from rq_hf.metrics.moments import FeatureMoments
from rq_hf.metrics.statistics import FeatureStatistics
from rq_hf.untrusted_files import NumpyArchive

SCRIPT = EXAMPLES / "compute_statistics.py"
SHARD = 128
COUNT = 2 * SHARD + 70  # three shards, so that the second of two processes has none in the last round


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks") / "tiny-dinov2"
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    settings = {"size": {"height": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def network(network_folder):
    return load_feature_network(network_folder)


@pytest.fixture(scope="module")
def shape_files(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNT, 16, num_shards=2)


@pytest.fixture(scope="module")
def compute(network_folder):
    """(output file, options) -> the outcomes of the processes."""

    def run(output_file, *options, world_size=1):
        arguments = ["--cpu", "--network", network_folder, "--output_file", output_file, *options]
        return run_group(world_size, run_example, SCRIPT, arguments, output_file.parent)

    return run


@pytest.fixture(scope="module")
def all_shapes(tmp_path_factory, compute, shape_files):
    """The statistics file of all shapes, with features."""
    path = tmp_path_factory.mktemp("statistics") / "shapes.safetensors"
    options = ["--data_files", shape_files, "--name", "shapes", "--resolution", 12, "--keep_features"]
    (outcome,) = compute(path, *options)
    assert outcome.code == 0, outcome.output
    assert f"saved the statistics of {COUNT} images in {path}" in outcome.output
    assert f"SHA-256 {checksum(path)}" in outcome.output
    assert [entry.name for entry in path.parent.iterdir() if entry.name != "cache"] == ["shapes.safetensors"]
    return path


def stored(number, size=16):
    """The image of a shape, `(3, size, size)` in uint8."""
    return torch.from_numpy(np.array(draw_shape(number, size))).permute(2, 0, 1)


def assert_moments(path, features):
    moments, expected = FeatureStatistics.load(path).moments, FeatureMoments.of(features)
    assert moments.count == len(features)
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.covariance, expected.covariance, rtol=1e-4, atol=1e-6)


def test_statistics_are_those_of_the_features_of_all_images_in_order(all_shapes, network):
    pixels = torch.stack([to_pixels(draw_shape(number, 16), 12) for number in range(COUNT)])
    images = ((pixels + 1) * 127.5).round().to(torch.uint8)
    statistics = FeatureStatistics.load(all_shapes)
    torch.testing.assert_close(statistics.features, network(images).features, rtol=1e-4, atol=1e-5)
    assert_moments(all_shapes, network(images).features)
    assert statistics.provenance == {
        "dataset": "shapes",
        "split": "train",
        "transform": "centre crop and bilinear resize to 12×12",
        "count": COUNT,
        "uint8_rule": "stored",
        **network.identity(),
    }


@pytest.mark.parametrize("options", [["--streaming"], ["--dataloader_num_workers", 2]], ids=["stream", "threads"])
def test_two_processes_write_the_same_file(all_shapes, compute, shape_files, tmp_path, options):
    source = ["--data_files", shape_files, "--name", "shapes", "--resolution", 12, "--keep_features"]
    for outcome in compute(tmp_path / "shapes.safetensors", *source, *options, world_size=2):
        assert outcome.code == 0, outcome.output
    assert checksum(tmp_path / "shapes.safetensors") == checksum(all_shapes)


def test_images_of_several_sizes_are_taken_as_they_are(compute, network, tmp_path):
    sizes = [16, 16, 20, 16]
    (tmp_path / "images").mkdir()
    for number, size in enumerate(sizes):
        draw_shape(number, size).save(tmp_path / "images" / f"{number}.png")
    (outcome,) = compute(tmp_path / "some.safetensors", "--dataset_name", tmp_path / "images")
    assert outcome.code == 0, outcome.output
    features = torch.cat([network(stored(number, size)[None]).features for number, size in enumerate(sizes)])
    assert_moments(tmp_path / "some.safetensors", features)
    provenance = FeatureStatistics.load(tmp_path / "some.safetensors").provenance
    assert (provenance["dataset"], provenance["transform"]) == (str(tmp_path / "images"), "none")


@pytest.mark.parametrize("num_images", [None, SHARD + 3])
def test_images_of_adm(compute, network, tmp_path, num_images):
    images = torch.stack([stored(number) for number in range(COUNT)])
    path = tmp_path / "theirs.npz"
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), mu=np.zeros(3), sigma=np.eye(3))
    options = [] if num_images is None else ["--num_images", num_images]
    (outcome,) = compute(tmp_path / "ours.safetensors", "--images", path, "--split", "val", *options)
    assert outcome.code == 0, outcome.output
    assert_moments(tmp_path / "ours.safetensors", network(images).features[:num_images])
    statistics = FeatureStatistics.load(tmp_path / "ours.safetensors", dataset="theirs.npz", transform="none")
    assert statistics.provenance["split"] == ("val" if num_images is None else f"val[:{num_images}]")
    assert statistics.features is None


class TestMoments:
    """Statistics of another program."""

    GIVEN = ("--name", "shapes", "--count", 50, "--transform", "centre crop", "--uint8_rule", "stored")

    @pytest.fixture
    def theirs(self, tmp_path):
        def save(size):
            np.savez(tmp_path / "theirs.npz", mu=np.arange(size) / 7, sigma=np.eye(size))
            return tmp_path / "theirs.npz"

        return save

    def test_are_saved_with_what_they_are_of(self, compute, network, theirs, tmp_path):
        options = ["--moments", theirs(network.num_features), *self.GIVEN]
        (outcome,) = compute(tmp_path / "ours.safetensors", *options)
        assert outcome.code == 0, outcome.output
        statistics = FeatureStatistics.load(tmp_path / "ours.safetensors")
        assert torch.equal(statistics.moments.mean, torch.arange(12).double() / 7)
        given = {"dataset": "shapes", "split": "train", "transform": "centre crop", "count": 50}
        assert statistics.provenance == given | network.identity() | {"uint8_rule": "stored"}

    def test_of_another_network_are_refused(self, compute, theirs, tmp_path):
        (outcome,) = compute(tmp_path / "ours.safetensors", "--moments", theirs(2048), *self.GIVEN)
        assert outcome.code == 1
        assert "theirs.npz has 2048 features, tiny-dinov2 has 12" in outcome.output


def test_an_image_that_cannot_be_decoded_is_named_or_left_out(compute, tmp_path):
    rows = create_shapes(SHARD + 20, 16).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[SHARD + 7]["image"]["bytes"] = b"no image"
    files = write_parquet(datasets.Dataset.from_list(rows, features=create_shapes(1).features), tmp_path / "corrupt")
    for outcome in compute(tmp_path / "some.safetensors", "--data_files", files, world_size=2):
        assert outcome.code == 1
        assert f"the image of example {SHARD + 7} cannot be decoded" in outcome.output
    assert not (tmp_path / "some.safetensors").exists()
    (outcome,) = compute(tmp_path / "some.safetensors", "--data_files", files, "--skip_corrupt_images")
    assert f"saved the statistics of {SHARD + 19} images" in outcome.output
    assert "; 1 images could not be decoded" in outcome.output
    assert FeatureStatistics.load(tmp_path / "some.safetensors").provenance["count"] == SHARD + 19


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_an_existing_file_stays(script, monkeypatch, tmp_path):
    (tmp_path / "some.safetensors").write_text("mine")
    options = ["--network", "clean-fid", "--dataset_name", "a", "--output_file", str(tmp_path / "some.safetensors")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(ValueError, match="--output_file must be new; .*some.safetensors exists"):
        script["main"]()
    assert (tmp_path / "some.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --dataset_name, --data_files, --images, --moments, got none"),
        (["--dataset_name", "a", "--images", "b.npz"], "got --dataset_name and --images"),
        (["--images", "b.npz", "--resolution", 8], "--resolution does not apply to --images"),
        (["--moments", "b.npz", "--num_images", 8], "--num_images does not apply to --moments"),
        (["--moments", "b.npz", "--count", 8], "--moments and --transform go together, got None"),
        (["--dataset_name", "a", "--count", 8], "--moments and --count go together, got 8"),
        (["--dataset_name", "a", "--num_images", 1], "--num_images must be at least 2, got 1"),
        (["--dataset_name", "a", "--output_file", "a.npz"], "--output_file must end in .safetensors, got a.npz"),
    ],
)
def test_wrong_options_are_refused(script, monkeypatch, options, message):
    given = ["--network", "clean-fid", "--output_file", "some.safetensors", *map(str, options)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    with pytest.raises(ValueError, match=message):
        script["main"]()


@pytest.mark.parametrize("sizes", [[], [0, 0], [3], [2, 0, 2], [4, 4], [5, 1], [1, 1, 9, 0, 2]])
def test_blocks_do_not_depend_on_how_features_come(script, sizes):
    features = torch.arange(sum(sizes)).float()[:, None]
    blocks = list(script["in_blocks"](features.split(sizes), 4))
    assert [len(block) for block in blocks] == [4] * (sum(sizes) // 4) + [sum(sizes) % 4] * (sum(sizes) % 4 > 0)
    assert torch.equal(torch.cat([features[:0], *blocks]), features)


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"got float64 \(2, 4, 4, 3\)"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"got uint8 \(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"got uint8 \(0, 4, 4, 3\)"),
        ({"mu": np.zeros(3)}, "got no arr_0"),
    ],
)
def test_archives_of_other_arrays_are_refused(script, tmp_path, arrays, found):
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(ValueError, match=rf"must have uint8 images \(N, height, width, 3\) in arr_0, {found}"):
        list(script["shards_of_archive"](NumpyArchive(tmp_path / "theirs.npz"), None))


def test_help_shows_the_manual(compute, tmp_path):
    (outcome,) = compute(tmp_path / "some.safetensors", "--help")
    assert outcome.code == 0
    assert SCRIPT.read_text().split('"""')[1].replace("\\\\", "\\") in outcome.output
    assert "--network NETWORK --output_file FILE" in outcome.output
