"""Quality of reconstructions and usage of the codebook."""

import torch

from ..argument_checks import check_floating, check_int64, check_range, check_size


def psnr(pixels: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of every image `(B, 3, height, width)` in [-1, 1], in dB: `(B,)`.

    Both are rounded to 8 bits, as when they are saved. Equal images have 100 dB instead of infinity, so that means
    over images stay finite.
    """
    check_floating("pixels", pixels, "B", "channels", "height", "width")
    check_floating("reconstructions", reconstructions, *pixels.shape)
    images, others = ((x.float() * 127.5 + 127.5).clamp(0, 255).round() for x in (pixels, reconstructions))
    squared_error = ((images - others) / 255).square().flatten(1).mean(dim=1)
    return -10 * squared_error.clamp(min=1e-10).log10()


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
    if counts.min() < 0:
        raise ValueError(f"counts must be at least 0, got {counts.min()}")
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return {
        "usage": (counts > 0).float().mean(dim=-1),
        "perplexity": torch.special.entr(share).sum(dim=-1).exp(),
    }
