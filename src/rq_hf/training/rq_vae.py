"""Stage 1: the objective of the RQ-VAE (Lee et al., CVPR 2022, section 3.1.3), its validation and its first codebook.

Pixels are `(B, channels, height, width)` in [-1, 1].
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from PIL import Image

from ..argument_checks import check_number
from ..metrics import LPIPS, codebook_usage, count_codes
from ..models import RQVAEModel
from .reconstruction import AutoencoderLoss, comparison_grid, reconstruction_quality, validation_means
from .trackers import log_images


class RQVAELoss(AutoencoderLoss):
    """
    (model, batch with `pixels`) -> [`LossOutput`]

        L = L_recon + β·L_commit,    L_recon = ‖X − X̂‖²,    L_commit = Σ_d ‖Z − sg[Ẑ⁽ᵈ⁾]‖²

    with means instead of sums; for a codebook that is trained by gradient, the codebook loss is added.

    Args:
        model: the RQ-VAE, not prepared.
        commitment_weight (`float`): β.
        options: further arguments of [`AutoencoderLoss`].
    """

    def __init__(self, model: RQVAEModel, *, commitment_weight: float = 0.25, **options):
        check_number("commitment_weight", commitment_weight, "be at least 0")
        super().__init__(model.decoder.conv_out.weight, **options)
        self.commitment_weight = commitment_weight
        self.codebook_size = model.config.codebook_size

    def reconstruct(
        self, model: torch.nn.Module, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        output = model(pixels)
        loss = self.commitment_weight * output.commitment_loss
        if output.codebook_loss is not None:
            loss = loss + output.codebook_loss
        metrics = {"loss_commitment": output.commitment_loss}
        metrics |= usage_metrics(count_codes(output.codes, self.codebook_size), prefix="batch_")
        return output.sample.float(), loss, metrics


def usage_metrics(counts: Iterable[torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Codebook usage and perplexity from counts `(K,)` of every depth: `{prefix}usage_depth_1`, ..."""
    depths = [codebook_usage(count[None]) for count in counts]
    return {
        f"{prefix}{name}_depth_{d}": values[name][0]
        for name in ("usage", "perplexity")
        for d, values in enumerate(depths, start=1)
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
    legend = ["original", *(f"depth {d}" for d in range(1, model.config.depth + 1))]
    return comparison_grid(reconstructions(model, pixels).unflatten(0, (len(legend), len(pixels))), legend)


@torch.no_grad()
def validation_metrics(
    model: RQVAEModel, batches: Sequence[torch.Tensor], perceptual: LPIPS | None = None
) -> dict[str, float]:
    """PSNR in dB, LPIPS if given, and for every depth usage and perplexity, on batches of pixels: `validation/...`."""
    quality, counts = [], 0
    for pixels in batches:
        pixels = pixels.to(model.device)
        output = model(pixels)
        quality.append(reconstruction_quality(pixels, output.sample, perceptual))
        counts = counts + count_codes(output.codes, model.config.codebook_size)
    usage = usage_metrics(counts, prefix="validation/")
    return validation_means(quality) | {name: value.item() for name, value in usage.items()}


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
