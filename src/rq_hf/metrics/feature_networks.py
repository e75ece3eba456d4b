"""
Feature networks: what a metric sees of an image, with every step from 8 bits to features.

    network = load_feature_network("pytorch-fid", weights="pt_inception-2015-12-05-6726825d.pth")
    network.distance_name, network(images).features

Statistics can be compared only between images that took the same steps, which `FeatureNetwork.identity` names.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, CLIPModel, Dinov2Model, Dinov2WithRegistersModel

from ..argument_checks import (
    check_dense,
    check_floating,
    check_instance,
    check_items,
    check_number,
    check_shape,
    check_size,
    check_source,
    check_unit_interval,
    check_values,
)
from ..files import checksum
from .inception import SIDE, FIDInception
from .scorers import image_settings, normalize
from .small_classifier import CIFAR10_FOLDER, SmallClassifier
from .small_classifier import SIDE as CLASSIFIER_SIDE
from .weights import find_weights

INCEPTION = "inception-2015-12-05"
# Of pt_inception-2015-12-05-6726825d.pth of pytorch-fid, and of the file of torch-fidelity, which is the same.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SMALL_CLASSIFIER = "cifar10-small"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PROBE_SIZE = 32  # of the image that shows the number of features


class NetworkOutput(NamedTuple):
    """Features `(B, F)` and, for classifiers, logits `(B, classes)`, float32."""

    features: torch.Tensor
    logits: torch.Tensor | None = None


class FeatureNetwork:
    """
    Images `(B, 3, height, width)` uint8 -> [`NetworkOutput`], in float32 without TF32 or autocast, so that features do
    not depend on the batch beyond rounding. Made by [`load_feature_network`] and `from_module`.

    Raises `TypeError` for images that are not uint8 and `ValueError` for other shapes. The protocol pytorch-fid takes
    floats in [0, 1], too.

    Attributes:
        name: of the network.
        protocol: of the steps before it.
        sha256: of its weights, in hexadecimal digits.
        num_features: F.
    """

    def __init__(
        self,
        name: str,
        protocol: str,
        sha256: str,
        module: nn.Module,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        extract: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
        takes_floats: bool = False,
    ):
        """
        Args:
            module: on whose device all is computed.
            prepare: images -> inputs of the network.
            extract: inputs -> features, or features and logits, by `module`.
            takes_floats: whether `prepare` takes floats in [0, 1], too.
        """
        self.name = name
        self.protocol = protocol
        self.sha256 = sha256
        self.module = module.eval()
        self.prepare = prepare
        self.extract = extract
        self.takes_floats = takes_floats
        self.num_features = self(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, dtype=torch.uint8)).features.shape[1]

    @classmethod
    def from_module(
        cls, module: nn.Module, name: str, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> "FeatureNetwork":
        """
        Any network of float32 weights, which from now on is in evaluation mode.

        Args:
            module: maps `(B, 3, size, size)` to features `(B, F)`, or to features and logits.
            name: under which results are reported.
            size: height and width of its inputs, in pixels. Images are resized with bicubic filtering and without
                cropping.
            mean, std: normalization of its inputs, per channel, of values in [0, 1].

        `sha256` is computed from the names and values of the weights.
        """
        check_instance("module", module, nn.Module)
        check_instance("name", name, str)
        if not name:
            raise ValueError("name must not be empty")
        check_size("size", size)
        for argument, values in (("mean", mean), ("std", std)):
            check_items(argument, values, 3)
            for i, value in enumerate(values):
                check_number(f"{argument}[{i}]", value, "be greater than 0" if argument == "std" else "be finite")
        for key, weight in module.state_dict().items():
            if weight.is_floating_point() and weight.dtype != torch.float32:
                raise ValueError(f"the weights of module must be float32, got {weight.dtype} for {key}")
        return cls(name, f"bicubic {size}", hash_weights(module), module, resizer(size, mean, std), module)

    @property
    def distance_metric(self) -> str:
        """`"fid"`, which is the Fréchet distance of one network only, or `"frechet_distance"`."""
        return "fid" if self.sha256 == INCEPTION_SHA256 else "frechet_distance"

    @property
    def distance_name(self) -> str:
        """The same for people; that of FID says how images were resized for it."""
        return f"FID ({self.protocol})" if self.distance_metric == "fid" else f"Fréchet distance ({self.name})"

    @property
    def device(self) -> torch.device:
        weight = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if weight is None else weight.device

    def to(self, device: torch.device | str) -> "FeatureNetwork":
        self.module.to(device)
        return self

    def identity(self) -> dict[str, str]:
        """What must be equal for features to be comparable."""
        return {"network": self.name, "protocol": self.protocol, "network_sha256": self.sha256}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> NetworkOutput:
        self.check_images(images)
        device = self.device
        with full_precision(device):
            output = self.extract(self.prepare(images.to(device)).to(device))
        found = (output,) if isinstance(output, torch.Tensor) else output
        if not isinstance(found, tuple) or len(found) not in (1, 2):
            raise TypeError(f"{self.name} must give out features, or features and logits, got {output!r:.80}")
        for kind, values in zip(("features", "logits"), found):
            check_floating(f"the {kind} of {self.name}", values, len(images), kind)
        return NetworkOutput(*(values.float() for values in found))

    def check_images(self, images: torch.Tensor) -> None:
        check_dense("images", images)
        check_values("images", images)
        check_shape("images", images, "B", 3, "height", "width")
        if self.takes_floats and images.is_floating_point():
            check_unit_interval("images", images)
        elif images.dtype != torch.uint8:
            accepted = "uint8 or floating point" if self.takes_floats else "uint8 (see rq_hf.images.to_uint8)"
            raise TypeError(f"images must be {accepted} for {self.name} ({self.protocol}), got {images.dtype}")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever the user allows elsewhere."""
    backends = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, before):
            operation.fp32_precision = precision


def pytorch_fid_inputs(images: torch.Tensor) -> torch.Tensor:
    """`InceptionV3.forward` of pytorch-fid 0.3.0: bilinear without antialiasing, values in [-1, 1]."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return 2 * F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def torch_fidelity_inputs(images: torch.Tensor) -> torch.Tensor:
    """`FeatureExtractorInceptionV3.forward` of torch-fidelity 0.4.0, which follows TensorFlow's graph."""
    return (resize_like_tensorflow_1(images.float(), SIDE) - 128) / 128


def resize_like_tensorflow_1(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Bilinear resizing by `tf.image.resize_bilinear` of TensorFlow 1, `(B, C, height, width)` -> `(B, C, size, size)`.

    Pixel i of the output lies at i·n/size of the n pixels of the input, not at (i + ½)·n/size − ½: an enlarged image
    is moved to the upper left by up to half a pixel of the input.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        positions = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        lower = positions.long()
        upper = (lower + 1).clamp(max=length - 1)
        share = (positions - lower).view(-1, 1) if dim == 2 else positions - lower
        before, after = images.index_select(dim, lower), images.index_select(dim, upper)
        images = before + (after - before) * share
    return images


def clean_fid_inputs(images: torch.Tensor) -> torch.Tensor:
    """`make_resizer("PIL", False, "bicubic", (299, 299))` and `InceptionV3W.forward` of clean-fid 0.1.35: each channel
    resized by Pillow as floats, with antialiasing, and clipped to [0, 255] instead of rounded to 8 bits."""
    channels = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels]
    values = torch.from_numpy(np.stack(resized).clip(0, 255)).unflatten(0, images.shape[:2])
    return (values - 128) / 128


def resizer(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images uint8 -> normalized `(B, 3, size, size)`, see [`normalize`]."""
    return lambda images: normalize(images.float() / 255, size, mean, std)


INCEPTION_INPUTS = {
    "pytorch-fid": pytorch_fid_inputs,
    "torch-fidelity": torch_fidelity_inputs,
    "clean-fid": clean_fid_inputs,
}


def load_feature_network(network: str, weights: str | None = None, sha256: str | None = None) -> FeatureNetwork:
    """
    Args:
        network: one of

            * `"pytorch-fid"`, `"torch-fidelity"` or `"clean-fid"`: the Inception network of FID, after the steps of
              that package. For torch-fidelity, logits lack the bias of the last layer, as those from which that
              package computes the Inception Score.
            * `"cifar10-small"`: the classifier that comes with the package, a [`SmallClassifier`]. Images are resized
              to 32×32 with bicubic filtering and without cropping. Its logits are those of the classes of CIFAR-10.
            * a folder or Hub id of CLIP (its image embeddings, not normalized to unit length) or DINOv2 (its class
              token after the last normalization). Images are resized to the square that its
              `preprocessor_config.json` names, with bicubic filtering and without cropping.

        weights: of Inception: a file, or `user/repository/file` on the Hub, with the state dict
            `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid (also a file of safetensors).
        sha256: of the file of weights; of Inception, that of pytorch-fid's by default. Another one must be named here,
            and results are then called "Fréchet distance" instead of "FID".

    Raises `ValueError` for a file with another hash, for missing weights and for models of other kinds.
    """
    check_instance("network", network, str)
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ValueError(f"sha256 must have 64 hexadecimal digits in lower case, got {sha256!r:.80}")
    if network in INCEPTION_INPUTS:
        return load_inception(network, weights, INCEPTION_SHA256 if sha256 is None else sha256)
    if weights is not None:
        raise ValueError(f"network must be one of {list(INCEPTION_INPUTS)} to have a file of weights, got {network!r}")
    if network == SMALL_CLASSIFIER:
        return load_small_classifier(sha256)
    return load_transformers_model(network, sha256)


def load_inception(protocol: str, weights: str | None, sha256: str) -> FeatureNetwork:
    if weights is None:
        raise ValueError(
            f"{protocol} needs weights, the file pt_inception-2015-12-05-6726825d.pth from the releases of "
            "pytorch-fid (https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights)"
        )
    path = find_weights(weights)
    check_hash(path, sha256)
    inception = FIDInception.from_file(path)
    if protocol == "torch-fidelity":
        inception.fc.bias = None
    name = INCEPTION if sha256 == INCEPTION_SHA256 else f"inception-{sha256[:8]}"
    prepare, takes_floats = INCEPTION_INPUTS[protocol], protocol == "pytorch-fid"
    return FeatureNetwork(name, protocol, sha256, inception, prepare, inception, takes_floats)


def load_small_classifier(sha256: str | None) -> FeatureNetwork:
    path = CIFAR10_FOLDER / "model.safetensors"
    found = check_hash(path, sha256)
    classifier = SmallClassifier()
    classifier.load_state_dict(load_file(path))

    def extract(pixels):
        features = classifier.features(pixels)
        return features, classifier.classifier(features)

    prepare = resizer(CLASSIFIER_SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    return FeatureNetwork(SMALL_CLASSIFIER, f"bicubic {CLASSIFIER_SIDE}", found, classifier, prepare, extract)


def load_transformers_model(source: str, sha256: str | None) -> FeatureNetwork:
    check_source("network", source)
    accepted = f"one of {[*INCEPTION_INPUTS, SMALL_CLASSIFIER]} or a model of one of {list(EMBEDDINGS)}"
    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except OSError as error:
        raise OSError(f"network must be {accepted}; {source} cannot be read: {error}") from error
    if kind not in EMBEDDINGS:
        raise ValueError(f"network must be {accepted}; {source} is a model of {kind}")
    size, mean, std = image_settings(source)
    path = find_model_file(source)
    found = check_hash(path, sha256)
    model_class, embed = EMBEDDINGS[kind]
    model, report = model_class.from_pretrained(
        source, dtype=torch.float32, use_safetensors=path.suffix == ".safetensors", output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more weights")
    name, prepare = os.path.basename(os.path.abspath(source)), resizer(size, mean, std)
    return FeatureNetwork(name, f"bicubic {size}", found, model, prepare, partial(embed, model))


def embed_by_clip(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.visual_projection(model.vision_model(pixels).pooler_output)


def embed_by_dinov2(model: Dinov2Model | Dinov2WithRegistersModel, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixels).pooler_output


EMBEDDINGS = {
    "clip": (CLIPModel, embed_by_clip),
    "dinov2": (Dinov2Model, embed_by_dinov2),
    "dinov2_with_registers": (Dinov2WithRegistersModel, embed_by_dinov2),
}


def find_model_file(source: str) -> Path:
    """The weights in a folder or Hub id. Raises `ValueError` unless they are one file."""
    for name in WEIGHT_FILES:
        if os.path.isdir(source):
            if (path := Path(source) / name).is_file():
                return path
        else:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(source, name))
    raise ValueError(f"{source} must hold its weights in one file, {' or '.join(WEIGHT_FILES)}")


def check_hash(path: Path, expected: str | None) -> str:
    """SHA-256 of a file. Raises `ValueError` for another than is expected, if one is."""
    found = checksum(path)
    if expected is not None and found != expected:
        raise ValueError(f"{path} has the SHA-256 {found}, not {expected}; name the hash of another file by sha256")
    return found


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of the names and values in a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()
