"""What the trainings of both autoencoders share: the losses on images, their validation and logged images.

Pixels are `(B, channels, height, width)` in [-1, 1].
"""

from collections.abc import Callable, Sequence

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..argument_checks import check_choice, check_number
from ..data import first_batches
from ..images import captioned_grid
from ..metrics import LPIPS, psnr
from .adversarial import DiscriminatorTrainer
from .loop import LossOutput

RECONSTRUCTION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class AutoencoderLoss:
    """
    (model, batch with `pixels`) -> [`LossOutput`]

        L = L_recon + L_latents

    with means instead of sums. LPIPS is added to L_recon, and an adversarial term to L. Subclasses define L_latents,
    in [`reconstruct`]. Outputs are the pixels and their reconstructions.

    Args:
        last_layer: weight of the last layer of the decoder.
        reconstruction_loss (`str`): `"mse"`, the squared error, or `"l1"`.
        perceptual: LPIPS; `None` leaves it out.
        perceptual_weight (`float`): weight of LPIPS.
        discriminator: gives the adversarial term, and is also a hook of [`train`]; `None` leaves it out.
    """

    def __init__(
        self,
        last_layer: torch.nn.Parameter,
        *,
        reconstruction_loss: str = "mse",
        perceptual: LPIPS | None = None,
        perceptual_weight: float = 1.0,
        discriminator: DiscriminatorTrainer | None = None,
    ):
        check_choice("reconstruction_loss", reconstruction_loss, list(RECONSTRUCTION_LOSSES))
        check_number("perceptual_weight", perceptual_weight, "be at least 0")
        self.distance = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.last_layer = last_layer

    def reconstruct(
        self, model: torch.nn.Module, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstructions, float32, the loss L_latents and metrics."""
        raise NotImplementedError

    def __call__(self, model: torch.nn.Module, batch: dict) -> LossOutput:
        pixels = batch["pixels"]
        sample, latent_loss, metrics = self.reconstruct(model, pixels)
        reconstruction = self.distance(sample, pixels)
        metrics = {"loss_reconstruction": reconstruction, **metrics}
        if self.perceptual is not None:
            metrics["loss_perceptual"] = self.perceptual(sample, pixels).mean()
            reconstruction = reconstruction + self.perceptual_weight * metrics["loss_perceptual"]
        loss = reconstruction + latent_loss
        if self.discriminator is not None:
            generator_loss, generator_metrics = self.discriminator.generator_loss(
                sample, reconstruction, self.last_layer
            )
            loss, metrics = loss + generator_loss, metrics | generator_metrics
        metrics["psnr"] = psnr(pixels, sample.detach()).mean()
        return LossOutput(loss, metrics, outputs=(pixels, sample))


def first_pixels(
    dataset: datasets.Dataset | datasets.IterableDataset,
    collate: Callable[[list[dict]], dict],
    count: int,
    batch_size: int,
) -> list[torch.Tensor]:
    """The pixels of the first `count` examples, in batches; see [`first_batches`]."""
    return [batch["pixels"] for batch in first_batches(dataset, collate, count, batch_size)]


def reconstruction_quality(
    pixels: torch.Tensor, sample: torch.Tensor, perceptual: LPIPS | None
) -> dict[str, torch.Tensor]:
    """`psnr` in dB and, if given, `lpips` of every image, each `(B,)`."""
    quality = {"psnr": psnr(pixels, sample)}
    if perceptual is not None:
        quality["lpips"] = perceptual(sample.clamp(-1, 1), pixels)
    return quality


def validation_means(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The means over all images of values `(B,)` of batches, as `validation/...`."""
    return {f"validation/{name}": torch.cat([batch[name] for batch in batches]).mean().item() for name in batches[0]}


def comparison_grid(images: torch.Tensor, legend: Sequence[str]) -> Image.Image:
    """N versions of B images, `(N, B, channels, height, width)` about [0, 1], and what to write below each version ->
    one row for every image."""
    images = images.float().clamp(0, 1).transpose(0, 1).flatten(0, 1)
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    return captioned_grid(images, list(legend) * (len(images) // len(legend)), columns=len(legend))


def check_unsharded(accelerator: Accelerator) -> None:
    """Raises `ValueError` when the model would be sharded."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "an autoencoder is trained with plain data parallelism (--multi_gpu), "
            f"got {accelerator.distributed_type.value}: the adaptive weight of its adversarial loss needs a whole "
            "layer, and sharded or in bf16 the codebook of an RQ-VAE would lose its moving average"
        )
