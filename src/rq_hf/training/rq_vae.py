"""Stage 1: the objective of the RQ-VAE (Lee et al., CVPR 2022, section 3.1.3), its validation and its first codebook.

Pixels are `(B, channels, height, width)` in [-1, 1].
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..argument_checks import check_choice, check_number
from ..images import captioned_grid
from ..metrics import LPIPS, codebook_usage, count_codes, psnr
from ..model_cards import RQVAE_USAGE, model_card
from ..models import RQVAEModel
from .adversarial import DiscriminatorTrainer
from .loop import LossOutput
from .trackers import log_images

RECONSTRUCTION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class RQVAELoss:
    """
    (model, batch with `pixels`) -> [`LossOutput`]

        L = L_recon + β·L_commit,    L_recon = ‖X − X̂‖²,    L_commit = Σ_d ‖Z − sg[Ẑ⁽ᵈ⁾]‖²

    with means instead of sums. LPIPS is added to L_recon; the adversarial term and, for a codebook that is trained by
    gradient, the codebook loss are added to L. Outputs are the pixels and their reconstructions.

    Args:
        model: the RQ-VAE, not prepared.
        reconstruction_loss (`str`): `"mse"`, the squared error, or `"l1"`.
        commitment_weight (`float`): β.
        perceptual: LPIPS; `None` leaves it out.
        perceptual_weight (`float`): weight of LPIPS.
        discriminator: gives the adversarial term, and is also a hook of [`train`]; `None` leaves it out.
    """

    def __init__(
        self,
        model: RQVAEModel,
        *,
        reconstruction_loss: str = "mse",
        commitment_weight: float = 0.25,
        perceptual: LPIPS | None = None,
        perceptual_weight: float = 1.0,
        discriminator: DiscriminatorTrainer | None = None,
    ):
        check_choice("reconstruction_loss", reconstruction_loss, list(RECONSTRUCTION_LOSSES))
        check_number("commitment_weight", commitment_weight, "be at least 0")
        check_number("perceptual_weight", perceptual_weight, "be at least 0")
        self.distance = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.commitment_weight = commitment_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.last_layer = model.decoder.conv_out.weight
        self.codebook_size = model.config.codebook_size

    def __call__(self, model: torch.nn.Module, batch: dict) -> LossOutput:
        pixels = batch["pixels"]
        output = model(pixels)
        sample = output.sample.float()
        reconstruction = self.distance(sample, pixels)
        metrics = {"loss_reconstruction": reconstruction, "loss_commitment": output.commitment_loss}
        if self.perceptual is not None:
            metrics["loss_perceptual"] = self.perceptual(sample, pixels).mean()
            reconstruction = reconstruction + self.perceptual_weight * metrics["loss_perceptual"]
        loss = reconstruction + self.commitment_weight * output.commitment_loss
        if output.codebook_loss is not None:
            loss = loss + output.codebook_loss
        if self.discriminator is not None:
            generator_loss, generator_metrics = self.discriminator.generator_loss(
                sample, reconstruction, self.last_layer
            )
            loss, metrics = loss + generator_loss, metrics | generator_metrics
        metrics["psnr"] = psnr(pixels, sample.detach()).mean()
        metrics |= usage_metrics(count_codes(output.codes, self.codebook_size), prefix="batch_")
        return LossOutput(loss, metrics, outputs=(pixels, sample))


def usage_metrics(counts: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """Codebook usage and perplexity from `counts` `(D, K)`, a metric for every depth: `{prefix}usage_depth_1`, ..."""
    values = codebook_usage(counts)
    return {
        f"{prefix}{name}_depth_{d}": value
        for name in ("usage", "perplexity")
        for d, value in enumerate(values[name], start=1)
    }


@torch.no_grad()
def initialize_codebook(model: RQVAEModel, batches: Iterable[torch.Tensor]) -> None:
    """Sets the codebook by k-means on the encoder's features of batches of pixels."""
    vectors = [model.encode_to_vectors(pixels.to(model.device)) for pixels in batches]
    model.quantizer.initialize(torch.cat(vectors))


@torch.no_grad()
def reconstructions(model: RQVAEModel, pixels: torch.Tensor) -> torch.Tensor:
    """The images in [0, 1], then their reconstructions from the first d codes for d = 1..D: `(B + D·B, ...)`."""
    codes = model.get_codes(pixels.to(model.device))
    samples = [model.decode_codes(codes, depth=d).sample.cpu() for d in range(1, model.config.depth + 1)]
    return torch.cat([pixels, *samples]) / 2 + 0.5


def reconstruction_grid(model: RQVAEModel, pixels: torch.Tensor) -> Image.Image:
    """One row for every image of the pixels: the image, then its reconstructions, coarse to fine."""
    depth = model.config.depth
    by_depth = reconstructions(model, pixels).float().clamp(0, 1).unflatten(0, (1 + depth, len(pixels)))
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(by_depth.transpose(0, 1).flatten(0, 1)))
    legend = ["original", *(f"depth {d}" for d in range(1, depth + 1))]
    return captioned_grid(images, legend * len(pixels), columns=1 + depth)


@torch.no_grad()
def validation_metrics(
    model: RQVAEModel, batches: Sequence[torch.Tensor], perceptual: LPIPS | None = None
) -> dict[str, float]:
    """PSNR in dB, LPIPS if given, and for every depth usage and perplexity, on batches of pixels: `validation/...`."""
    quality, distances, counts = [], [], 0
    for pixels in batches:
        pixels = pixels.to(model.device)
        output = model(pixels)
        quality.append(psnr(pixels, output.sample))
        if perceptual is not None:
            distances.append(perceptual(output.sample.clamp(-1, 1), pixels))
        counts = counts + count_codes(output.codes, model.config.codebook_size)
    metrics = {"validation/psnr": torch.cat(quality).mean()}
    if perceptual is not None:
        metrics["validation/lpips"] = torch.cat(distances).mean()
    metrics |= usage_metrics(counts, prefix="validation/")
    return {name: value.item() for name, value in metrics.items()}


def evaluate_reconstructions(
    accelerator: Accelerator,
    model: RQVAEModel,
    shown: torch.Tensor,
    held_out: Sequence[torch.Tensor],
    perceptual: LPIPS | None,
    step: int,
) -> dict[str, float]:
    """Logs the [`reconstruction_grid`] of the pixels `shown`; returns [`validation_metrics`] of batches, if any."""
    log_images(accelerator, {"reconstructions": reconstruction_grid(model, shown)}, step)
    return validation_metrics(model, held_out, perceptual) if held_out else {}


def rqvae_card(model: RQVAEModel) -> str:
    """The model card of a trained RQ-VAE."""
    shape = "×".join(map(str, model.code_shape))
    title = f"RQ-VAE {model.config.sample_size}² → {shape}, {model.config.codebook_size} codewords"
    return model_card(title, RQVAE_USAGE, tags=["rq-vae", "image-tokenizer"])
