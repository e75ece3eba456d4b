"""Statistics of the features of a set of images, and what they were computed from."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..argument_checks import check_choice, check_finite, check_floating, check_instance, check_integer
from ..files import atomic_file, checksum
from ..images import UINT8_RULES
from ..untrusted_files import NumpyArchive, check_contents_are_there, one_line, shown, shown_first
from .moments import FeatureMoments

IDENTITY = ("network", "protocol", "network_sha256")
PROVENANCE = ("dataset", "split", "transform", "count", *IDENTITY, "uint8_rule")
STORED, FLOATS = "stored", "none"
METADATA = "feature_statistics"
MAX_FEATURES = 2**14  # of an npz file: their covariance takes 2 GB


@dataclass
class FeatureStatistics:
    """
    Mean and covariance of the features of images, or also the features themselves, and where they come from.

    Args:
        moments: mean and covariance.
        provenance: what distances to these statistics depend on, all of it:
            `dataset`, `split`: names of the images;
            `transform`: how they were cropped and resized before the network;
            `count`: their number;
            `network`, `protocol`, `network_sha256`: [`FeatureNetwork.identity`];
            `uint8_rule`: how they got 8 bits: one of [`UINT8_RULES`], `"stored"` if they had them from the start, or
            `"none"` if they stayed floats.
        features: `(count, F)` float32, which KID, precision and recall need.

    `file` and `sha256` are the name and the SHA-256 of the file that they were saved in or loaded from. Raises
    `ValueError`/`TypeError` for a provenance that lacks something, and for moments and features of another size.
    """

    moments: FeatureMoments
    provenance: dict[str, str | int]
    features: torch.Tensor | None = None
    file: str | None = field(default=None, init=False)
    sha256: str | None = field(default=None, init=False)

    def __post_init__(self):
        check_instance("moments", self.moments, FeatureMoments)
        check_provenance(self.provenance)
        count = self.provenance["count"]
        if self.moments.count != count:
            raise ValueError(f"the moments are those of {self.moments.count} images, the provenance has count {count}")
        if self.features is not None:
            check_floating("features", self.features, count, self.moments.num_features)
            check_finite("features", self.features)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.safetensors` file: `mean`, `covariance` and maybe `features`, and the provenance as metadata.
        Raises `ValueError` for another suffix, `FileExistsError` for a file that exists."""
        path = as_path(path, ".safetensors")
        if path.exists():
            raise FileExistsError(f"{path} exists; save the statistics under another name")
        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        if self.features is not None:
            tensors["features"] = self.features.detach().cpu().float()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        provenance = {name: self.provenance[name] for name in PROVENANCE}
        description = {"provenance": provenance, "contents_sha256": fingerprint(provenance, tensors)}
        with atomic_file(path) as unfinished:
            save_file(tensors, unfinished, {METADATA: json.dumps(description)})
            self.file, self.sha256 = path.name, checksum(unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike, **provenance: str | int) -> "FeatureStatistics":
        """
        Args:
            path: a file of [`save`], or an `.npz` file with the mean `mu` `(F,)` and covariance `sigma` `(F, F)` of
                pytorch-fid, clean-fid, the authors, or ADM, of which nothing else is read.
            provenance: what the file does not say; an `.npz` file says nothing. Of a network in another format, pass
                the [`FeatureNetwork.identity`] of the one with the same weights.

        Raises `ValueError` for provenance that is missing or contradicts the file, and for a file that is damaged or
        of another kind.
        """
        path = as_path(path, ".safetensors", ".npz")
        unknown = sorted(provenance.keys() - set(PROVENANCE))
        if unknown:
            raise TypeError(f"provenance must be {', '.join(PROVENANCE)}, got {', '.join(unknown)}")
        check_contents_are_there(path, str(path))
        if path.suffix == ".npz":
            said, features, (mean, covariance) = {}, None, read_numpy_moments(path)
        else:
            said, mean, covariance, features = read_saved(path)
        for name, value in provenance.items():
            if said.get(name, value) != value:
                raise ValueError(f"{path} says {name} {shown(said[name])}, got {shown(value)}")
        missing = [name for name in PROVENANCE if name not in said | provenance]
        if missing:
            raise ValueError(f"{path} does not say {', '.join(missing)}: pass them")
        try:
            check_provenance(said | provenance)
            moments = FeatureMoments.from_moments((said | provenance)["count"], mean, covariance)
            if moments.covariance.diagonal().min() < 0:
                raise ValueError("covariance must have variances of at least 0")
            statistics = cls(moments, said | provenance, features)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        statistics.file, statistics.sha256 = path.name, checksum(path)
        return statistics

    @property
    def label(self) -> str:
        """The images, for messages."""
        return f"{self.provenance['dataset']} ({self.provenance['split']})"


def check_comparable(statistics: FeatureStatistics, others: FeatureStatistics) -> None:
    """
    Raises `ValueError` unless a distance between the two has a meaning: features of the same network by the same
    protocol, and the same rule from floats to 8 bits, unless the images of one had 8 bits from the start.
    """
    for name in (*IDENTITY, "uint8_rule"):
        values = [one.provenance[name] for one in (statistics, others)]
        if values[0] != values[1] and not (name == "uint8_rule" and STORED in values):
            raise ValueError(
                f"statistics must have the same {name}: {statistics.label} has {values[0]}, "
                f"{others.label} has {values[1]}"
            )
    sizes = [one.moments.num_features for one in (statistics, others)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"statistics must have the same number of features: {statistics.label} has {sizes[0]}, "
            f"{others.label} has {sizes[1]}"
        )


def check_identity(identity: dict[str, str]) -> None:
    """Raises `TypeError`/`ValueError` unless this is what [`FeatureNetwork.identity`] returns."""
    check_instance("the identity of a network", identity, dict)
    if set(identity) != set(IDENTITY):
        raise ValueError(f"the identity of a network must have {', '.join(IDENTITY)}, got {', '.join(identity)}")
    for name in IDENTITY:
        check_text(name, identity[name])
    check_sha256("network_sha256", identity["network_sha256"])


def check_provenance(provenance: dict[str, str | int]) -> None:
    """Raises `TypeError`/`ValueError` unless every entry is there, and nothing else, with a value that it can have."""
    check_instance("provenance", provenance, dict)
    missing = [name for name in PROVENANCE if name not in provenance]
    unknown = [name for name in provenance if name not in PROVENANCE]
    if missing or unknown:
        raise ValueError(
            f"provenance must have {', '.join(PROVENANCE)}; "
            + f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(map(shown, unknown)) or 'none'}"
        )
    check_integer("count", provenance["count"], 2, 2**63 - 1)
    for name in ("dataset", "split", "transform"):
        check_text(name, provenance[name])
    check_identity({name: provenance[name] for name in IDENTITY})
    check_choice("uint8_rule", provenance["uint8_rule"], (*UINT8_RULES, STORED, FLOATS))


def check_text(name: str, value: str) -> None:
    check_instance(name, value, str)
    if not value.strip():
        raise ValueError(f"{name} must not be empty")


def check_sha256(name: str, value: str) -> None:
    check_instance(name, value, str)
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} must be a SHA-256 of 64 hexadecimal digits, got {shown(value)}")


def as_path(path: str | os.PathLike, *suffixes: str) -> Path:
    """Raises `TypeError` unless this is a path, `ValueError` unless it ends in one of the suffixes."""
    check_instance("path", path, str | os.PathLike)
    if Path(path).suffix not in suffixes:
        raise ValueError(f"a file of statistics must end in {' or '.join(suffixes)}, got {path}")
    return Path(path)


def fingerprint(provenance: dict[str, str | int], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of everything in a file."""
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def read_saved(path: Path) -> tuple[dict[str, str | int], torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Provenance, mean, covariance and features, if any, of a file of [`FeatureStatistics.save`]."""
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            description = json.loads((file.metadata() or {}).get(METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in names if description is not None}
        if description is None:
            raise ValueError(f"it holds no statistics of features, but {shown_first(names, 5)}")
        if fingerprint(description["provenance"], tensors) != description["contents_sha256"]:
            raise ValueError("its contents do not match their checksum")
        check_instance("provenance", description["provenance"], dict)
        return description["provenance"], tensors["mean"], tensors["covariance"], tensors.get("features")
    except Exception as error:  # safetensors has an exception of its own
        raise ValueError(f"{path} is truncated, damaged or of another kind: {shown(one_line(error))}") from error


def read_numpy_moments(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of an `.npz` file, in float64."""
    archive = NumpyArchive(path)
    for name in ("mu", "sigma"):
        if name not in archive.headers:
            found = shown_first(archive.headers, 10) or "nothing"
            raise ValueError(f"{path} must have the mean mu and the covariance sigma, got {found}")
        shape, dtype = archive.headers[name]
        if dtype.kind != "f" or not shape or max(shape) > MAX_FEATURES:
            raise ValueError(
                f"{path}: {name} must have floats of at most {MAX_FEATURES:,} features, got {dtype} {shape}"
            )
    return tuple(torch.from_numpy(archive.read(name).astype("float64")) for name in ("mu", "sigma"))
