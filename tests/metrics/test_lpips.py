import pytest
import torch

from rq_hf.metrics.lpips import LPIPS, WIDTHS


def test_is_zero_for_equal_images_and_grows_with_the_difference():
    torch.manual_seed(0)
    lpips, pixels, noise = LPIPS(), torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    for head in lpips.heads:
        head.weight.abs_()
    distances = [lpips(pixels, pixels + scale * noise).mean().item() for scale in (0, 0.05, 0.5)]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


def test_of_one_channel_is_that_of_grey_images():
    lpips, (grey, other) = LPIPS(), torch.rand(2, 2, 1, 32, 32) * 2 - 1
    assert torch.equal(lpips(grey, other), lpips(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))


def test_computes_in_single_precision_under_autocast():
    lpips, pixels = LPIPS(), torch.rand(1, 3, 32, 32)
    expected = lpips(pixels, -pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(pixels, -pixels), expected)


def test_names_the_missing_weights_and_files(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate(WIDTHS)}, tmp_path / "h")
    with pytest.raises(ValueError, match="vgg.pth lacks features.0.bias and 24 more of 26 weights"):
        LPIPS.from_pretrained(str(tmp_path / "vgg.pth"), str(tmp_path / "h"))
    with pytest.raises(ValueError, match="missing.pth is neither a file nor user/repository/file on the Hub"):
        LPIPS.from_pretrained("missing.pth", str(tmp_path / "h"))
