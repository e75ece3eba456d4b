"""The KL tokenizer of MAR: a variational autoencoder with a small weight of its KL term (Rombach et al., CVPR 2022,
section 3.1 and appendix G), its objective and validation.

Pixels are `(B, channels, height, width)` in [-1, 1].
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ..argument_checks import check_number
from ..metrics import LPIPS
from ..models.continuous_latents import encode_moments, measure_scaling_factor, sample_latents
from .reconstruction import AutoencoderLoss, comparison_grid, reconstruction_quality, validation_means
from .trackers import log_images


class AutoencoderKLForTraining(torch.nn.Module):
    """Encodes, samples and decodes in one forward pass, and returns what it sampled from, which `AutoencoderKL` does
    not. DDP synchronizes the gradients of `forward` only."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels -> reconstructions of the same shape, and moments `(B, 2·C, H, W)`, float32."""
        posterior = DiagonalGaussianDistribution(encode_moments(self.vae, pixels).float())
        return self.vae.decode(posterior.sample()).sample, posterior.parameters


class AutoencoderKLLoss(AutoencoderLoss):
    """
    (model, batch with `pixels`) -> [`LossOutput`]

        L = L_recon + λ·L_KL,    L_KL = KL(N(μ, σ²) ‖ N(0, 1)) / number of pixel values

    with the KL divergence summed over the latents of an image: all terms of Rombach et al., appendix G, who sum over
    the pixels, divided by the same number.

    Args:
        model: not prepared.
        kl_weight (`float`): λ.
        options: further arguments of [`AutoencoderLoss`].
    """

    def __init__(self, model: AutoencoderKLForTraining, *, kl_weight: float = 1e-6, **options):
        check_number("kl_weight", kl_weight, "be at least 0")
        super().__init__(model.vae.decoder.conv_out.weight, **options)
        self.kl_weight = kl_weight

    def reconstruct(
        self, model: torch.nn.Module, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        sample, moments = model(pixels)
        kl = DiagonalGaussianDistribution(moments).kl().mean() / pixels[0].numel()
        return sample.float(), self.kl_weight * kl, {"loss_kl": kl}


@torch.no_grad()
def validation_metrics(
    vae: AutoencoderKL, batches: Sequence[torch.Tensor], perceptual: LPIPS | None = None
) -> dict[str, float]:
    """On batches of pixels, decoded from the means of their latents: PSNR in dB, LPIPS if given, and the KL divergence
    in nats per image: `validation/...`."""
    quality = []
    for pixels in batches:
        pixels = pixels.to(vae.device)
        posterior = vae.encode(pixels).latent_dist
        sample = vae.decode(posterior.mode()).sample
        quality.append(reconstruction_quality(pixels, sample, perceptual) | {"kl": posterior.kl()})
    return validation_means(quality)


@torch.no_grad()
def evaluate_autoencoder_kl(
    accelerator: Accelerator,
    vae: AutoencoderKL,
    shown: torch.Tensor,
    held_out: Sequence[torch.Tensor],
    perceptual: LPIPS | None,
    step: int,
) -> dict[str, float]:
    """Logs the pixels `shown` beside their reconstructions; returns [`validation_metrics`] of batches, if any."""
    log_images(accelerator, {"reconstructions": autoencoder_kl_grid(vae, shown)}, step)
    return validation_metrics(vae, held_out, perceptual) if held_out else {}


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, batches: Iterable[torch.Tensor], seed: int) -> None:
    """Sets `vae.config.scaling_factor` to 1 / standard deviation of latents sampled for batches of pixels."""
    vae.register_to_config(scaling_factor=1.0)
    generator = torch.Generator().manual_seed(seed)
    scale = measure_scaling_factor(
        sample_latents(vae, encode_moments(vae, pixels.to(vae.device)), generator) for pixels in batches
    )
    vae.register_to_config(scaling_factor=scale)


@torch.no_grad()
def autoencoder_kl_grid(vae: AutoencoderKL, pixels: torch.Tensor) -> Image.Image:
    """One row for every image of the pixels: the image and its reconstruction."""
    sample = vae.decode(vae.encode(pixels.to(vae.device)).latent_dist.mode()).sample.cpu()
    return comparison_grid(torch.stack([pixels, sample]) / 2 + 0.5, ["original", "reconstruction"])
