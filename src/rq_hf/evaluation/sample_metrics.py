"""The figures of generated images, from what their shards keep of every image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..argument_checks import check_choice, check_items
from ..images import to_uint8
from ..metrics.feature_networks import FeatureNetwork, full_precision
from ..metrics.frechet import frechet_distance, frechet_distance_infinity
from ..metrics.inception_score import inception_score
from ..metrics.kernel_distance import cmmd, kernel_inception_distance
from ..metrics.moments import FeatureMoments
from ..metrics.precision_recall import precision_recall
from ..metrics.scorers import CLIPScorer
from ..metrics.statistics import FeatureStatistics, check_comparable
from ..pipelines.rejection_sampling import Scorer
from .generation import GenerationFolder, Observer, Shard

# What each of them needs of [`SampleMetrics`].
NEEDS = {
    "fid": ("network", "reference"),
    "kid": ("network", "reference"),
    "fd_infinity": ("network", "reference"),
    "precision_recall": ("network", "reference"),
    "inception_score": ("network",),
    "cmmd": ("cmmd_network", "cmmd_reference"),
    "clip_score": ("clip",),
    "class_accuracy": ("classifier",),
}
NEED_REFERENCE_FEATURES = ("kid", "precision_recall", "cmmd")
KID = {"subsets": 100, "subset_size": 1000}
FD_INFINITY = {"sizes": 15, "smallest": 5000}
INCEPTION_SCORE = {"splits": 10, "deviation": "population"}
PRECISION_RECALL = {"neighbours": 3}
SUBSET_SEED = 0  # of KID and FD∞
FEWEST_IMAGES = {
    "fid": 2,
    "kid": KID["subset_size"],
    "fd_infinity": FD_INFINITY["smallest"] + 1,
    "precision_recall": PRECISION_RECALL["neighbours"] + 1,
    "inception_score": INCEPTION_SCORE["splits"],
    "cmmd": 2,
    "clip_score": 1,
    "class_accuracy": 1,
}


@dataclass
class SampleMetrics:
    """
    Metrics of generated images, and the networks and statistics that they need.

    Args:
        names: of [`NEEDS`].
        network, reference: of FID or another Fréchet distance, KID, FD∞, precision and recall; the Inception Score has
            the logits of this network.
        cmmd_network, cmmd_reference: a CLIP model, and statistics with the features of real images.
        classifier: whose most likely class is compared with that of each image.
        clip, clip_identity: for the cosine similarity of images and captions, and what it depends on, like
            [`FeatureNetwork.identity`].

    Raises `ValueError` where something is missing that a metric needs.
    """

    names: Sequence[str]
    network: FeatureNetwork | None = None
    reference: FeatureStatistics | None = None
    cmmd_network: FeatureNetwork | None = None
    cmmd_reference: FeatureStatistics | None = None
    classifier: FeatureNetwork | None = None
    clip: CLIPScorer | None = None
    clip_identity: dict[str, str] | None = None

    def __post_init__(self):
        check_items("names", self.names)
        for name in self.names:
            check_choice("a metric", name, list(NEEDS))
            for need in NEEDS[name]:
                if getattr(self, need) is None:
                    raise ValueError(f"{name} needs {' and '.join(NEEDS[name])}; {need} is missing")
        for name in NEED_REFERENCE_FEATURES:
            reference = self.cmmd_reference if name == "cmmd" else self.reference
            if name not in self.names:
                continue
            if reference.features is None:
                raise ValueError(
                    f"{name} needs statistics that hold features; those of {reference.label} have moments only"
                )
            check_enough(name, f"those of {reference.label} have", len(reference.features))

    @property
    def networks(self) -> dict[str, FeatureNetwork]:
        """Those that see the images, by the names that their outputs have in a shard."""
        networks = {self.classifier_name: self.classifier, "network": self.network, "cmmd": self.cmmd_network}
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def classifier_name(self) -> str:
        """One network that serves as both sees the images once."""
        return "network" if self.classifier is self.network else "classifier"

    def identities(self) -> dict[str, dict[str, str]]:
        """What the contents of shards depend on, by the names of the networks there."""
        identities = {name: network.identity() for name, network in self.networks.items()}
        return identities | ({} if self.clip is None else {"clip": self.clip_identity})

    def observers(self) -> list[Observer]:
        """What shards keep: features and logits of every network, and similarities."""
        observers = [network_observer(name, network) for name, network in self.networks.items()]
        return observers + ([] if self.clip is None else [clip_observer(self.clip)])

    @torch.no_grad()
    def check(
        self,
        num_images: int,
        image: torch.Tensor,
        conditions: Sequence[str] | Sequence[int] | None,
        provenance: dict,
    ) -> None:
        """
        What would fail after hours fails here.

        Args:
            num_images: to come.
            image (`(3, height, width)`, uint8): one like those to come.
            conditions: their captions or labels.
            provenance: of their statistics, see [`FeatureStatistics`], without the network and the count.

        Raises `ValueError` for too few images, statistics that cannot be compared, networks that do not accept such
        images or have no logits or other classes, and metrics that need captions or labels without them.
        """
        for name in self.names:
            check_enough(name, "got", num_images)
        kind = None if conditions is None else type(conditions[0])
        if "clip_score" in self.names and kind is not str:
            raise ValueError("clip_score needs the captions of a text-to-image model")
        if "class_accuracy" in self.names and kind is not int:
            raise ValueError("class_accuracy needs the labels of a class-conditional model")
        outputs = {name: network(image.expand(2, -1, -1, -1)) for name, network in self.networks.items()}
        for name, reference in (("network", self.reference), ("cmmd", self.cmmd_reference)):
            if reference is not None:
                moments = FeatureMoments.of(outputs[name].features)
                ours = provenance | {"count": 2} | self.networks[name].identity()
                check_comparable(FeatureStatistics(moments, ours), reference)
        if "inception_score" in self.names and outputs["network"].logits is None:
            raise ValueError(f"inception_score needs logits, which {self.network.name} does not have")
        if "class_accuracy" in self.names:
            logits = outputs[self.classifier_name].logits
            if logits is None or logits.shape[1] <= max(conditions):
                found = "no logits" if logits is None else f"{logits.shape[1]} classes"
                raise ValueError(
                    f"class_accuracy needs the {max(conditions) + 1} classes of the model; "
                    f"{self.classifier.name} has {found}"
                )

    def basis(self, name: str) -> dict:
        """The `network` and `reference` of a metric, as a report takes them."""
        if name == "clip_score":
            return {"network": self.clip_identity}
        network, *reference = (getattr(self, need) for need in NEEDS[name])
        return {"network": network.identity()} | ({"reference": reference[0]} if reference else {})

    def compute(self, name: str, folder: GenerationFolder, shards: Sequence[Shard]) -> dict[str, dict]:
        """
        One metric of the images of these shards -> figures by name, each with its `value`, maybe `std`, and settings.

        FID is called `frechet_distance` for other networks than Inception.
        """
        generator = torch.Generator().manual_seed(SUBSET_SEED)
        if name == "fid":
            distance = frechet_distance(folder.moments(shards, "network.features"), self.reference.moments)
            return {self.network.distance_metric: {"value": distance}}
        if name == "kid":
            features = folder.gather(shards, "network.features")
            result = kernel_inception_distance(features, self.reference.features, **KID, generator=generator)
            settings = {"std_of": "subsets", "subset_seed": SUBSET_SEED, **KID}
            return {"kid": {"value": result["mean"], "std": result["std"], **settings}}
        if name == "fd_infinity":
            features = folder.gather(shards, "network.features")
            result = frechet_distance_infinity(features, self.reference.moments, **FD_INFINITY, generator=generator)
            settings = {"slope": result["slope"], "subset_seed": SUBSET_SEED, **FD_INFINITY}
            return {"fd_infinity": {"value": result["fd_infinity"], **settings}}
        if name == "precision_recall":
            features = folder.gather(shards, "network.features")
            result = precision_recall(features, self.reference.features, **PRECISION_RECALL)
            return {key: {"value": value, **PRECISION_RECALL} for key, value in result.items()}
        if name == "inception_score":
            result = inception_score(folder.gather(shards, "network.logits"), **INCEPTION_SCORE)
            settings = {"std_of": "splits", "order": "as sampled", **INCEPTION_SCORE}
            return {"inception_score": {"value": result["mean"], "std": result["std"], **settings}}
        if name == "cmmd":
            return {"cmmd": {"value": cmmd(folder.gather(shards, "cmmd.features"), self.cmmd_reference.features)}}
        if name == "clip_score":
            return {"clip_score": {"value": folder.gather(shards, "clip.similarity").double().mean().item()}}
        predicted = folder.gather(shards, f"{self.classifier_name}.logits").argmax(dim=-1)
        labels = torch.tensor([label for shard in shards for label in folder.plan.conditions_of(shard.images)])
        return {"class_accuracy": {"value": (predicted == labels).double().mean().item()}}


def check_enough(name: str, found: str, count: int) -> None:
    """Raises `ValueError` for fewer images than a metric needs."""
    if count < FEWEST_IMAGES[name]:
        raise ValueError(f"{name} needs at least {FEWEST_IMAGES[name]:,} images, {found} {count:,}")


def network_observer(name: str, network: FeatureNetwork) -> Observer:
    def observe(images, conditions):
        output = network(images)
        kept = {"features": output.features, "logits": output.logits}
        return {f"{name}.{key}": value for key, value in kept.items() if value is not None}

    return observe


def network_scorer(network: FeatureNetwork, uint8_rule: str) -> Scorer:
    """For rejection sampling: the log-probability of each label under a network with logits."""

    def score(images, labels):
        logits = network(to_uint8(images, uint8_rule)).logits
        return logits.log_softmax(dim=-1).gather(-1, torch.tensor(labels, device=logits.device)[:, None]).squeeze(-1)

    return score


def clip_observer(scorer: CLIPScorer) -> Observer:
    def observe(images, captions):
        with full_precision(scorer.model.device):
            return {"clip.similarity": scorer(images.float() / 255, captions)}

    return observe
