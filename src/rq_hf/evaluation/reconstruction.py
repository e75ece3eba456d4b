"""How well an autoencoder reconstructs images."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..argument_checks import check_choice, check_floating, check_instance, check_integer, check_values
from ..images import UINT8_RULES, to_uint8
from ..metrics import LPIPS, FeatureMoments, codebook_usage, count_codes, frechet_distance, psnr, ssim
from ..metrics.feature_networks import FeatureNetwork
from ..models import RQVAEModel
from ..models.continuous_latents import Autoencoder, check_autoencoder, decode_latents, encode_latents


class ReconstructionMeter:
    """
    Quality of the reconstructions of batches of images, and usage of the codebook.

        meter.add(meter.measure(pixels))  # for every batch
        meter.result()

    `measure` can be called on any process and `add` on one of them: sums are the same if batches are the same and are
    added in the same order. Everything is measured on images of 8 bits, as when they are saved.

    Args:
        vae: an [`RQVAEModel`], or an `AutoencoderKL`, whose latents are the means.
        network: features for the Fréchet distance between images and reconstructions; `None` leaves it out.
        perceptual: LPIPS; `None` leaves it out.
        depths: also reconstruct from the first d codes of an [`RQVAEModel`], for each d given (default: from all D).
        uint8_rule: from floats to 8 bits, see [`to_uint8`].
        autocast: a context for the arithmetic of `vae`, such as `accelerator.autocast`.
    """

    def __init__(
        self,
        vae: Autoencoder,
        network: FeatureNetwork | None = None,
        perceptual: LPIPS | None = None,
        depths: Iterable[int] | None = None,
        uint8_rule: str = "round",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        check_autoencoder(vae)
        check_choice("uint8_rule", uint8_rule, UINT8_RULES)
        if network is not None:
            check_instance("network", network, FeatureNetwork)
        if perceptual is not None:
            check_instance("perceptual", perceptual, LPIPS)
        self.vae = vae.eval()
        self.network = network
        self.perceptual = perceptual
        self.depths = check_depths(vae, depths)
        self.uint8_rule = uint8_rule
        self.autocast = autocast
        self.count = 0
        self.code_counts = 0  # (D, K)
        self.sums = {depth: Counter() for depth in self.depths}
        self.moments = {}  # of the features of the images, `"images"`, and of the reconstructions, by depth

    @torch.no_grad()
    def measure(self, pixels: torch.Tensor) -> dict:
        """Images `(B, channels, height, width)` in [-1, 1] -> what [`add`] takes, on the CPU. Raises `TypeError` or
        `ValueError` for other shapes and values."""
        check_floating("pixels", pixels, "B", self.vae.config.in_channels, "height", "width")
        check_values("pixels", pixels)
        pixels = pixels.to(self.vae.device)
        codes, samples = self.reconstruct(pixels)
        images = to_uint8(pixels.float() / 2 + 0.5, "round")  # they have 8 bits
        measured = {"count": len(pixels), "quality": {}, "features": {}}
        if codes is not None:
            measured["code_counts"] = count_codes(codes, self.vae.config.codebook_size).cpu()
        if self.network is not None:
            measured["features"]["images"] = self.features(images)
        images = from_8_bits(images)
        for depth, sample in samples.items():
            sample = to_uint8((sample.float() / 2 + 0.5).clamp(0, 1), self.uint8_rule)
            if self.network is not None:
                measured["features"][depth] = self.features(sample)
            sample = from_8_bits(sample)
            quality = {"psnr": psnr(images, sample), "ssim": ssim(images, sample)}
            if self.perceptual is not None:
                quality["lpips"] = self.perceptual(images, sample)
            measured["quality"][depth] = {name: values.double().sum().item() for name, values in quality.items()}
        return measured

    def add(self, measured: dict) -> None:
        """Adds what [`measure`] returned."""
        self.count += measured["count"]
        self.code_counts = self.code_counts + measured.get("code_counts", 0)
        for depth, sums in measured["quality"].items():
            self.sums[depth].update(sums)
        for key, features in measured["features"].items():
            self.moments.setdefault(key, FeatureMoments(features.shape[1])).update(features)

    def result(self) -> dict:
        """
        Returns:
            `count` of the images; `depths`, a dictionary with the means over images of `psnr` (dB), `ssim` and
            `lpips`, and `frechet_distance`, for every number of codes, or for `None` of an `AutoencoderKL`; and
            `usage` and `perplexity` of an `RQVAEModel`, a list of D numbers each, see [`codebook_usage`].

        Raises `ValueError` when there were no images.
        """
        if not self.count:
            raise ValueError("there are no images to reconstruct")
        result = {"count": self.count, "depths": {}}
        for depth in self.depths:
            result["depths"][depth] = {name: total / self.count for name, total in self.sums[depth].items()}
            if self.moments:
                distance = frechet_distance(self.moments["images"], self.moments[depth])
                result["depths"][depth]["frechet_distance"] = distance
        if isinstance(self.vae, RQVAEModel):
            result |= {name: values.tolist() for name, values in codebook_usage(self.code_counts).items()}
        return result

    def reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor | None, dict[int | None, torch.Tensor]]:
        """The codes `(B, H, W, D)` of an [`RQVAEModel`], and the reconstructions by depth, about [-1, 1]."""
        with self.autocast():
            if not isinstance(self.vae, RQVAEModel):
                return None, {None: decode_latents(self.vae, encode_latents(self.vae, pixels))}
            codes = self.vae.get_codes(pixels)
            return codes, {depth: self.vae.decode_codes(codes, depth=depth).sample for depth in self.depths}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(B, F)`, on the CPU, of images `(B, channels, height, width)` in uint8."""
        return self.network(images.expand(-1, 3, -1, -1)).features.cpu()


def from_8_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in uint8 -> pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def check_depths(vae: Autoencoder, depths: Iterable[int] | None) -> list[int | None]:
    """The numbers of codes to decode from, in increasing order. Raises `ValueError` for depths that the autoencoder
    does not have."""
    if not isinstance(vae, RQVAEModel):
        if depths is not None:
            raise ValueError(f"depths are those of the codes of an RQVAEModel, got {depths} and an AutoencoderKL")
        return [None]
    if depths is None:
        return [vae.config.depth]
    for depth in depths:
        check_integer("depths", depth, 1, vae.config.depth)
    return sorted(set(depths))
