"""
The continuous latents of an autoencoder: `(B, C, H, W)`, one vector of C channels per position of an H×W grid, centred
and scaled to about unit variance, float32.

An autoencoder (`vae`) is an [`~diffusers.AutoencoderKL`], whose encoder gives the mean and the log-variance of a
normal distribution (the *moments*), or an [`RQVAEModel`], whose latents are the vectors before its quantizer. Every
function raises `TypeError` for another class, and `ValueError` for an `AutoencoderKL` whose latents are to be
normalized per channel. Pixels are `(B, 3, height, width)` in [-1, 1].
"""

import math
import os
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..argument_checks import check_floating, check_instance, check_number
from ..model_cards import MAR_CITATION, model_card, quoted
from .pretrained import check_loading_info, reading
from .rq_vae import RQVAEModel

Autoencoder = AutoencoderKL | RQVAEModel


def load_autoencoder(name: str | os.PathLike) -> Autoencoder:
    """
    A trained autoencoder of the class that its `config.json` names.

    Args:
        name: a folder or a Hub id.

    Raises:
        `ValueError`: another class, missing or unknown weights, or broken files. `FileNotFoundError`: neither a folder
        nor possible on the Hub.
    """
    with reading("an autoencoder", name):
        found = AutoencoderKL.load_config(name).get("_class_name")
        if found == RQVAEModel.__name__:
            return RQVAEModel.from_pretrained(name)
        if found != AutoencoderKL.__name__:
            raise ValueError(f"the autoencoder {name} must be an AutoencoderKL or an RQVAEModel, got {found!r}")
        vae, info = AutoencoderKL.from_pretrained(name, output_loading_info=True)
    check_loading_info(name, info)
    return vae


def check_autoencoder(vae: Autoencoder) -> None:
    """Raises `TypeError` for another class, `ValueError` for a config that these functions do not follow."""
    check_instance("vae", vae, Autoencoder)
    check_number("the vae's scaling_factor", vae.config.scaling_factor, "be greater than 0")
    for name in ("latents_mean", "latents_std"):
        if vae.config.get(name) is not None:
            raise ValueError(f"the vae's {name} must be None: latents are scaled by one number, scaling_factor")
    if vae.config.get("shift_factor") is not None:
        check_number("the vae's shift_factor", vae.config.shift_factor, "be finite")


def pixels_per_latent(vae: Autoencoder) -> tuple[int, int]:
    """Rows and columns of pixels that one position of the latents covers."""
    check_autoencoder(vae)
    if isinstance(vae, RQVAEModel):
        return vae.pixels_per_code
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor, factor


def latent_shape(vae: Autoencoder) -> tuple[int, int, int]:
    """`(C, H, W)` of the latents of an image of `vae.config.sample_size`."""
    rows, columns = pixels_per_latent(vae)
    size = vae.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = vae.config.codebook_dim if isinstance(vae, RQVAEModel) else vae.config.latent_channels
    return channels, height // rows, width // columns


def encode_moments(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """
    What latents are sampled from, see [`sample_latents`]; not scaled, in the arithmetic of the encoder.

    Returns:
        `(B, 2·C, H, W)`, means and then log-variances, of an `AutoencoderKL`; `(B, C, H, W)`, the latents themselves,
        of an `RQVAEModel`.

    Raises:
        `ValueError` for another number of channels, or sides that [`pixels_per_latent`] does not divide; `TypeError`
        for pixels that are not floating point.
    """
    rows, columns = pixels_per_latent(vae)
    check_floating("pixels", pixels, "B", vae.config.in_channels, "height", "width")
    height, width = pixels.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"height and width must be divisible by {rows} and {columns}, got {height}×{width}")
    if isinstance(vae, RQVAEModel):
        return vae.encode_to_vectors(pixels).permute(0, 3, 1, 2)
    return vae.encode(pixels.to(vae.dtype)).latent_dist.parameters


def sample_latents(
    vae: Autoencoder, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Scaled latents `(B, C, H, W)`, float32, sampled from moments `(B, 2·C, H, W)`; those of an `RQVAEModel`,
    `(B, C, H, W)`, have no variance and are only scaled."""
    check_moments(vae, moments)
    if isinstance(vae, RQVAEModel):
        return scale(vae, moments.float())
    return scale(vae, DiagonalGaussianDistribution(moments.float()).sample(generator))


def encode_latents(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, height, width)` in [-1, 1] -> scaled latents `(B, C, H, W)`, float32: the mean of an
    `AutoencoderKL`'s. Raises the errors of [`encode_moments`]."""
    channels, _, _ = latent_shape(vae)
    return scale(vae, encode_moments(vae, pixels)[:, :channels].float())


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents `(B, C, H, W)` -> pixels `(B, 3, height, width)`, about [-1, 1], not clamped."""
    channels, _, _ = latent_shape(vae)
    check_floating("latents", latents, "B", channels, "H", "W")
    latents = latents.float() / vae.config.scaling_factor + shift(vae)
    if isinstance(vae, RQVAEModel):
        return vae.decode(vae.unpatchify(latents.permute(0, 2, 3, 1))).sample
    return vae.decode(latents.to(vae.dtype)).sample


def measure_scaling_factor(latents: Iterable[torch.Tensor]) -> float:
    """
    1 / standard deviation of all values in batches of latents that are not scaled (Rombach et al., CVPR 2022,
    section D.1).

    Raises `ValueError` when there are no two different values, or infinite ones.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in latents:
        values = batch.double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    variance = (squares - total**2 / count) / (count - 1) if count > 1 else math.nan
    if not 0 < variance < math.inf:
        raise ValueError(f"a scaling factor needs latents with a finite variance greater than 0, got {variance}")
    return variance**-0.5


def check_moments(vae: Autoencoder, moments: torch.Tensor) -> None:
    """Raises `TypeError`/`ValueError` unless these can be what [`encode_moments`] gives."""
    channels, _, _ = latent_shape(vae)
    check_floating("moments", moments, "B", channels if isinstance(vae, RQVAEModel) else 2 * channels, "H", "W")


def shift(vae: Autoencoder) -> float:
    """What is subtracted from latents before they are scaled."""
    return vae.config.get("shift_factor") or 0.0


def scale(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    return (latents - shift(vae)) * vae.config.scaling_factor


def autoencoder_kl_card(vae: AutoencoderKL, model: str, **sections) -> str:
    """The model card of a KL tokenizer; `model` is the folder or Hub id that its code loads, `sections` are further
    arguments of [`model_card`]."""
    (channels, height, width), side = latent_shape(vae), vae.config.sample_size
    usage = f"""import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained({quoted(model)})
pixels = torch.rand(1, {vae.config.in_channels}, {side}, {side}) * 2 - 1  # images in [-1, 1], here of noise
posterior = vae.encode(pixels).latent_dist
latents = posterior.sample() * vae.config.scaling_factor  # (1, {channels}, {height}, {width})
pixels = vae.decode(latents / vae.config.scaling_factor).sample"""
    title = f"AutoencoderKL {side}² → {height}×{width}×{channels}"
    own = {
        "about": "An autoencoder of images with continuous latents, for a MAR model "
        "([Li et al., NeurIPS 2024](https://arxiv.org/abs/2406.11838)).",
        "tags": ["autoencoder-kl", "image-tokenizer"],
        "citation": MAR_CITATION,
    }
    return model_card(title, usage, **own | sections)
