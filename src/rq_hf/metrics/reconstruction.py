"""Quality of reconstructions and usage of the codebook."""

import torch
import torch.nn.functional as F

from ..argument_checks import check_floating, check_int64, check_range, check_size, check_values

SSIM_SIZE, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(pixels: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of every image `(B, 3, height, width)` in [-1, 1], in dB: `(B,)`.

    Both are rounded to 8 bits, as when they are saved. Equal images have 100 dB instead of infinity, so that means
    over images stay finite.
    """
    check_floating("pixels", pixels, "B", "channels", "height", "width")
    check_floating("reconstructions", reconstructions, *pixels.shape)
    check_values("pixels", pixels)
    check_values("reconstructions", reconstructions)
    images, others = (to_levels(x) for x in (pixels, reconstructions))
    squared_error = ((images - others) / 255).square().flatten(1).mean(dim=1)
    return -10 * squared_error.clamp(min=1e-10).log10()


def ssim(pixels: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of every image `(B, channels, height, width)` in [-1, 1]: `(B,)`, at most 1 (Wang et al.
    2004, section III.B).

    Both are rounded to 8 bits, as when they are saved. Means, variances and covariances are of a Gaussian window of
    11×11 pixels with a deviation of 1.5, wherever it fits within the image; the similarity is averaged over positions
    and channels. In float64.

    Raises `TypeError`/`ValueError` for other shapes, NaN, and images less than 11 pixels high or wide.
    """
    check_floating("pixels", pixels, "B", "channels", "height", "width")
    check_floating("reconstructions", reconstructions, *pixels.shape)
    if min(pixels.shape[2:]) < SSIM_SIZE:
        raise ValueError(f"pixels must be at least {SSIM_SIZE} high and wide, got {tuple(pixels.shape)}")
    for name, value in (("pixels", pixels), ("reconstructions", reconstructions)):
        check_values(name, value)
        if value.isnan().any():
            raise ValueError(f"{name} must not be NaN, got {int(value.isnan().sum())} of {value.numel()} that are")
    x, y = (to_levels(images).double() for images in (pixels, reconstructions))
    mean_x, mean_y = windowed(x), windowed(y)
    variances = windowed(x * x) + windowed(y * y) - mean_x.square() - mean_y.square()
    covariance = windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean(dim=(1, 2, 3)).float()


def windowed(images: torch.Tensor) -> torch.Tensor:
    """Weighted means `(B, channels, height - 10, width - 10)` of images over the window of [`ssim`]."""
    offsets = torch.arange(SSIM_SIZE, dtype=images.dtype, device=images.device) - SSIM_SIZE // 2
    weights = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    weights = weights / weights.sum()
    flat = F.conv2d(images.flatten(0, 1)[:, None], weights[None, None, :, None])
    return F.conv2d(flat, weights[None, None, None]).unflatten(0, images.shape[:2]).squeeze(2)


def check_pixels(name: str, pixels: torch.Tensor) -> None:
    """Raises `TypeError`/`ValueError` unless these are images `(B, channels, height, width)` in [-1, 1]."""
    check_floating(name, pixels, "B", "channels", "height", "width")
    check_values(name, pixels)
    lowest, highest = (value.item() for value in pixels.aminmax())
    if not -1 <= lowest <= highest <= 1:
        raise ValueError(f"{name} must lie in [-1, 1], got values from {lowest:.3g} to {highest:.3g}")


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] rounded to the 256 levels from 0 to 255."""
    return (pixels.float() * 127.5 + 127.5).clamp(0, 255).round()


def count_codes(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code occurs at each depth: codes `(..., D)` -> `(D, K)` int64. Counts of batches can be added."""
    check_size("codebook_size", codebook_size)
    check_int64("codes", codes, "...", "D")
    check_range("codes", codes, codebook_size)
    return torch.stack([torch.bincount(c, minlength=codebook_size) for c in codes.reshape(-1, codes.shape[-1]).t()])


def codebook_usage(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codebook usage statistics, one per depth, from `counts` `(D, K)` of [`count_codes`].

    Returns:
        `usage`: share of codes that occur, in [0, 1]; `perplexity`: exp of the entropy of the codes, in [1, K]. Each
        of shape `(D,)`.
    """
    check_int64("counts", counts, "D", "K")
    check_values("counts", counts)
    if counts.min() < 0:
        raise ValueError(f"counts must be at least 0, got {counts.min()}")
    share = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return {
        "usage": (counts > 0).float().mean(dim=-1),
        "perplexity": torch.special.entr(share).sum(dim=-1).exp().float(),
    }
