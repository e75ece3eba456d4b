import pytest
import torch

from rq_hf.evaluation.generation import GenerationFolder, GenerationPlan
from rq_hf.evaluation.sample_metrics import FEWEST_IMAGES, KID, NEEDS, SUBSET_SEED, SampleMetrics
from rq_hf.metrics import (
    FeatureMoments,
    FeatureNetwork,
    FeatureStatistics,
    cmmd,
    frechet_distance,
    frechet_distance_infinity,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)

NUM_IMAGES, NUM_FEATURES, CLASSES = FEWEST_IMAGES["fd_infinity"], 3, 5
REAL = {"dataset": "reals", "split": "train", "transform": "none", "uint8_rule": "stored"}
SAMPLED = {"dataset": "samples", "split": "seeds", "transform": "none", "uint8_rule": "round"}
IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


class MeanColor(torch.nn.Module):
    """Features: the mean colour; logits as many as there are classes."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(NUM_FEATURES, CLASSES)

    def forward(self, pixels):
        features = pixels.mean(dim=(2, 3))
        return features, self.head(features)


def network_of(module=MeanColor, name="color"):
    torch.manual_seed(0)
    return FeatureNetwork.from_module(module(), name, 4, [0.5] * 3, [0.5] * 3)


def statistics_of(source, features, **changes):
    provenance = REAL | {"count": len(features)} | source.identity() | changes
    return FeatureStatistics(FeatureMoments.of(features), provenance, features)


@pytest.fixture(scope="module")
def reference():
    return statistics_of(network_of(), torch.randn(1200, NUM_FEATURES, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def metrics(reference):
    network = network_of()
    return SampleMetrics(
        [name for name in NEEDS if name != "clip_score"], network, reference, network, reference, network
    )


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A folder with the features and logits of all images, and the same as tensors."""
    plan = GenerationPlan(NUM_IMAGES, list(range(CLASSES)), shard_size=2000)
    folder = GenerationFolder(tmp_path_factory.mktemp("evaluation"), plan)
    folder.open()
    generator = torch.Generator().manual_seed(2)
    for shard in plan.shards(0):
        features = torch.randn(len(shard.images), NUM_FEATURES, generator=generator) + 0.3
        logits = torch.randn(len(shard.images), CLASSES, generator=generator)
        folder.save(shard, {"network.features": features, "network.logits": logits, "cmmd.features": features * 2})
    shards = plan.shards(0)
    return folder, shards, folder.gather(shards, "network.features"), folder.gather(shards, "network.logits")


def seeded():
    return torch.Generator().manual_seed(SUBSET_SEED)


class TestCompute:
    def test_distances(self, metrics, sampled, reference, monkeypatch):
        monkeypatch.setitem(KID, "subsets", 3)  # for speed
        folder, shards, features, _ = sampled
        distance = metrics.compute("fid", folder, shards)
        assert list(distance) == ["frechet_distance"]  # not of Inception
        assert distance["frechet_distance"]["value"] == pytest.approx(frechet_distance(features, reference.features))
        infinity = frechet_distance_infinity(features, reference.moments, generator=seeded())["fd_infinity"]
        assert metrics.compute("fd_infinity", folder, shards)["fd_infinity"]["value"] == infinity
        kid = kernel_inception_distance(features, reference.features, subsets=3, generator=seeded())
        actual = metrics.compute("kid", folder, shards)["kid"]
        assert (actual["value"], actual["std"], actual["std_of"]) == (kid["mean"], kid["std"], "subsets")
        expected = cmmd(2 * features, reference.features)
        assert metrics.compute("cmmd", folder, shards)["cmmd"]["value"] == pytest.approx(expected)

    def test_precision_and_recall(self, metrics, sampled, reference):
        folder, shards, features, _ = sampled
        actual = metrics.compute("precision_recall", folder, shards)
        assert {name: figure["value"] for name, figure in actual.items()} == precision_recall(
            features, reference.features
        )

    def test_of_logits(self, metrics, sampled):
        folder, shards, _, logits = sampled
        actual = metrics.compute("inception_score", folder, shards)["inception_score"]
        expected = inception_score(logits)
        assert (actual["value"], actual["std"]) == (expected["mean"], expected["std"])
        labels = torch.arange(NUM_IMAGES) % CLASSES
        accuracy = (logits.argmax(dim=-1) == labels).double().mean().item()
        assert metrics.compute("class_accuracy", folder, shards)["class_accuracy"]["value"] == accuracy

    def test_of_some_shards_only(self, metrics, sampled, reference):
        folder, shards, features, _ = sampled
        value = metrics.compute("fid", folder, shards[:1])["frechet_distance"]["value"]
        assert value == pytest.approx(frechet_distance(features[:2000], reference.features))


class TestCheck:
    def test_accepts_what_fits(self, metrics):
        metrics.check(NUM_IMAGES, IMAGE, [0, 1, 4], SAMPLED)

    @pytest.mark.parametrize("name", FEWEST_IMAGES)
    def test_refuses_too_few_images(self, reference, name):
        network = network_of()
        metrics = SampleMetrics([name], network, reference, network, reference, network, clip=lambda *_: 0)
        with pytest.raises(ValueError, match=f"{name} needs at least {FEWEST_IMAGES[name]:,} images, got"):
            metrics.check(FEWEST_IMAGES[name] - 1, IMAGE, [0], SAMPLED)

    def test_refuses_too_few_real_images(self):
        network = network_of()
        few = statistics_of(network, torch.randn(999, NUM_FEATURES))
        with pytest.raises(ValueError, match=r"kid needs at least 1,000 images, those of reals \(train\) have 999"):
            SampleMetrics(["kid"], network, few)

    def test_refuses_statistics_without_features(self, reference):
        moments_only = FeatureStatistics(reference.moments, reference.provenance)
        with pytest.raises(ValueError, match="precision_recall needs statistics that hold features"):
            SampleMetrics(["precision_recall"], network_of(), moments_only)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"network": "other"}, "must have the same network:"),
            ({"protocol": "bicubic 8"}, "must have the same protocol:"),
            ({"uint8_rule": "truncate"}, "must have the same uint8_rule:"),
        ],
    )
    def test_refuses_statistics_of_something_else(self, changes, message):
        network = network_of()
        metrics = SampleMetrics(["fid"], network, statistics_of(network, torch.randn(9, NUM_FEATURES), **changes))
        with pytest.raises(ValueError, match=message):
            metrics.check(NUM_IMAGES, IMAGE, None, SAMPLED)

    def test_refuses_a_network_without_logits(self):
        network = network_of(lambda: torch.nn.Flatten(), "flat")
        with pytest.raises(ValueError, match="inception_score needs logits, which flat does not have"):
            SampleMetrics(["inception_score"], network).check(NUM_IMAGES, IMAGE, None, SAMPLED)
        with pytest.raises(ValueError, match="class_accuracy needs the 3 classes of the model; flat has no logits"):
            SampleMetrics(["class_accuracy"], classifier=network).check(NUM_IMAGES, IMAGE, [0, 2], SAMPLED)

    def test_refuses_a_classifier_of_fewer_classes(self):
        metrics = SampleMetrics(["class_accuracy"], classifier=network_of())
        with pytest.raises(ValueError, match="needs the 6 classes of the model; color has 5 classes"):
            metrics.check(NUM_IMAGES, IMAGE, [0, 5], SAMPLED)
        with pytest.raises(ValueError, match="class_accuracy needs the labels of a class-conditional model"):
            metrics.check(NUM_IMAGES, IMAGE, ["red apple"], SAMPLED)

    def test_refuses_metrics_that_lack_something(self):
        for names, message in (
            (["fid"], "fid needs network and reference; network is missing"),
            (["clip_score"], "clip_score needs clip; clip is missing"),
            (["lpips"], "a metric must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                SampleMetrics(names)
