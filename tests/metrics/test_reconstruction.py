import math

import pytest
import torch
from golden import FOLDER, require
from safetensors.torch import load_file

from rq_hf.metrics import codebook_usage, count_codes, psnr, ssim


def test_psnr_is_that_of_the_8_bit_images():
    level = 1 / 127.5
    black = torch.full((2, 3, 4, 4), -1.0)
    brighter = black + torch.tensor([1.0, 2.0])[:, None, None, None] * level
    torch.testing.assert_close(psnr(black, brighter), 20 * torch.log10(torch.tensor([255.0, 255.0 / 2])))
    torch.testing.assert_close(psnr(black, black + 0.4 * level), torch.full((2,), 100.0))
    torch.testing.assert_close(psnr(black, black - 7), torch.full((2,), 100.0))


def test_ssim_equals_the_definition_at_every_position():
    """Wang et al. 2004, eq. 13, with sums over windows of 11×11 pixels."""
    pixels = torch.rand(2, 3, 14, 12, dtype=torch.double) * 2 - 1
    others = (pixels + 0.6 * torch.randn(2, 3, 14, 12)).clamp(-1, 1)
    x, y = (((images.float() + 1) * 127.5).round().double() for images in (pixels, others))
    weights = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    values = torch.zeros(2, 3, 4, 2, dtype=torch.double)
    for row, column in ((i, j) for i in range(4) for j in range(2)):
        a, b = (images[..., row : row + 11, column : column + 11] for images in (x, y))
        mean = [(weights * window).sum(dim=(2, 3), keepdim=True) for window in (a, b)]
        a, b = a - mean[0], b - mean[1]
        variance_a, variance_b, covariance = ((weights * p).sum(dim=(2, 3)) for p in (a * a, b * b, a * b))
        mean_a, mean_b = (m.flatten(1) for m in mean)
        values[..., row, column] = ((2 * mean_a * mean_b + 2.55**2) * (2 * covariance + 7.65**2)) / (
            (mean_a**2 + mean_b**2 + 2.55**2) * (variance_a + variance_b + 7.65**2)
        )
    found = ssim(pixels, others)
    assert 0.1 < found.min() < found.max() < 0.9
    torch.testing.assert_close(found, values.mean(dim=(1, 2, 3)).float())
    torch.testing.assert_close(ssim(pixels, pixels), torch.ones(2))


def test_ssim_refuses_by_name():
    pixels = torch.rand(1, 3, 12, 12)
    for wrong, message in (
        (torch.rand(1, 3, 12, 10), r"reconstructions must have the shape \(1, 3, 12, 12\), got \(1, 3, 12, 10\)"),
        (pixels * torch.nan, "reconstructions must not be NaN, got 432 of 432 that are"),
    ):
        with pytest.raises(ValueError, match=message):
            ssim(pixels, wrong)
    with pytest.raises(ValueError, match="pixels must be at least 11 high and wide"):
        ssim(pixels[..., :10], pixels[..., :10])


def test_counts_of_codes_per_depth():
    codes = torch.tensor([[[0, 0], [0, 1]], [[2, 1], [0, 3]]])
    assert count_codes(codes, 4).tolist() == [[3, 0, 1, 0], [1, 2, 0, 1]]


def test_codebook_usage_per_depth():
    statistics = codebook_usage(torch.tensor([[3, 0, 1, 0], [1, 1, 1, 1], [0, 5, 0, 0], [0, 0, 0, 0]]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(statistics["usage"], torch.tensor([0.5, 1.0, 0.25, 0.0]))
    torch.testing.assert_close(statistics["perplexity"], torch.tensor([math.exp(entropy), 4.0, 1.0, 1.0]))


@require("metrics/io.safetensors")
def test_histogram_and_entropy_equal_the_recorded_ones():
    recorded = load_file(FOLDER / "metrics" / "io.safetensors")
    batches = [codes for name, codes in sorted(recorded.items()) if name.startswith("in/codebook/codes")]
    histogram = recorded["out/codebook/usage_histogram"]
    counts = sum(count_codes(codes, histogram.shape[1]) for codes in batches)
    positions = math.prod(batches[0].shape[1:-1])
    torch.testing.assert_close(counts / positions, histogram, rtol=1e-6, atol=1e-6)
    perplexity = codebook_usage(counts)["perplexity"]
    torch.testing.assert_close(perplexity, recorded["out/codebook/perplexity_exp_entropy"], rtol=1e-6, atol=0)
    torch.testing.assert_close(perplexity.log(), recorded["out/codebook/entropy"], rtol=1e-6, atol=0)
    pooled = codebook_usage(count_codes(batches[0].reshape(-1, 1), histogram.shape[1]))["perplexity"].log()
    torch.testing.assert_close(pooled, recorded["out/codebook/entropy_pooled_codes0"], rtol=1e-6, atol=0)
