import pytest
import torch
from tiny import D, K, tiny_kl, tiny_vae
from torch import nn

from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.images import to_uint8
from rq_hf.metrics import LPIPS, FeatureNetwork, codebook_usage, count_codes, frechet_distance, psnr, ssim

SIDE = 16


class Corners(nn.Module):
    """Pixels -> the values of their upper left corner."""

    def forward(self, pixels):
        return pixels[:, :, 0, 0]


@pytest.fixture
def pixels():
    return torch.randint(256, (7, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1


@pytest.fixture
def network():
    return FeatureNetwork.from_module(Corners(), "corners", SIDE, mean=(0.0,) * 3, std=(1.0,) * 3)


def measured(meter, pixels, size=3):
    for batch in pixels.split(size):
        meter.add(meter.measure(batch))
    return meter.result()


def in_8_bits(sample):
    return to_uint8((sample / 2 + 0.5).clamp(0, 1), "round")


class TestRQVAE:
    def test_measures_reconstructions_of_8_bits_from_the_first_codes(self, pixels, network):
        vae, perceptual = tiny_vae(), LPIPS()
        result = measured(ReconstructionMeter(vae, network, perceptual, depths=[D, 1, 2]), pixels)
        assert result["count"] == len(pixels)
        assert list(result["depths"]) == [1, 2, D]
        codes = vae.get_codes(pixels)
        for depth, quality in result["depths"].items():
            images = in_8_bits(vae.decode_codes(codes, depth=depth).sample)
            sample = images.float() / 127.5 - 1
            with torch.no_grad():
                distances = perceptual(pixels, sample)
            features = [network(x).features for x in (in_8_bits(pixels), images)]
            assert quality == {
                "psnr": pytest.approx(psnr(pixels, sample).mean().item()),
                "ssim": pytest.approx(ssim(pixels, sample).mean().item()),
                "lpips": pytest.approx(distances.mean().item(), rel=1e-4),
                "frechet_distance": pytest.approx(frechet_distance(*features), rel=1e-4),
            }
        usage = codebook_usage(count_codes(codes, K))
        assert result["usage"] == pytest.approx(usage["usage"].tolist())
        assert result["perplexity"] == pytest.approx(usage["perplexity"].tolist())

    def test_decodes_all_codes_and_measures_no_more_than_asked(self, pixels):
        vae = tiny_vae()
        result = measured(ReconstructionMeter(vae), pixels)
        assert list(result["depths"]) == [D]
        assert set(result["depths"][D]) == {"psnr", "ssim"}

    def test_rounds_reconstructions_by_the_rule(self, pixels):
        vae = tiny_vae()
        qualities = {
            rule: measured(ReconstructionMeter(vae, uint8_rule=rule), pixels)["depths"][D]["psnr"]
            for rule in ("round", "truncate")
        }
        sample = vae(pixels).sample
        for rule, quality in qualities.items():
            levels = to_uint8((sample / 2 + 0.5).clamp(0, 1), rule).float() / 127.5 - 1
            assert quality == pytest.approx(psnr(pixels, levels).mean().item())
        assert qualities["round"] != qualities["truncate"]

    def test_another_order_of_measuring_gives_the_same_result(self, pixels, network):
        vae = tiny_vae()
        expected = measured(ReconstructionMeter(vae, network), pixels)
        meter, other = (ReconstructionMeter(vae, network) for _ in range(2))
        batches = pixels.split(3)
        later = [other.measure(batch) for batch in reversed(batches)]
        for one in reversed(later):
            meter.add(one)
        assert meter.result() == expected

    def test_grey_images(self, network):
        vae = tiny_vae(in_channels=1, out_channels=1)
        pixels = torch.randint(256, (4, 1, SIDE, SIDE)).float() / 127.5 - 1
        quality = measured(ReconstructionMeter(vae, network), pixels)["depths"][D]
        sample = vae(pixels).sample
        features = [network(in_8_bits(x).expand(-1, 3, -1, -1)).features for x in (pixels, sample)]
        assert quality["frechet_distance"] == pytest.approx(frechet_distance(*features), rel=1e-4)


def test_reconstructs_from_the_means_of_an_autoencoder_kl(pixels):
    vae = tiny_kl()
    result = measured(ReconstructionMeter(vae), pixels)
    with torch.no_grad():
        sample = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert result == {
        "count": len(pixels),
        "depths": {
            None: {
                "psnr": pytest.approx(psnr(pixels, sample).mean().item()),
                "ssim": pytest.approx(ssim(pixels, sample).mean().item(), abs=1e-6),
            }
        },
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vae": nn.Linear(1, 1)}, TypeError, "vae must be of type"),
        ({"network": Corners()}, TypeError, "network must be of type FeatureNetwork"),
        ({"perceptual": "lpips"}, TypeError, "perceptual must be of type LPIPS"),
        ({"depths": [0, 1]}, ValueError, rf"depths must lie in \[1, {D}\], got 0"),
        ({"depths": [D + 1]}, ValueError, rf"depths must lie in \[1, {D}\], got {D + 1}"),
        ({"uint8_rule": "floor"}, ValueError, "uint8_rule must be one of .*, got 'floor'"),
        ({"vae": "kl", "depths": [1]}, ValueError, r"depths are those of the codes of an RQVAEModel, got \[1\]"),
    ],
)
def test_refuses_by_name(options, error, message):
    options = {"vae": tiny_vae()} | options
    if options["vae"] == "kl":
        options["vae"] = tiny_kl()
    with pytest.raises(error, match=message):
        ReconstructionMeter(**options)


def test_refuses_other_pixels_and_no_images(pixels):
    meter = ReconstructionMeter(tiny_vae())
    with pytest.raises(ValueError, match=r"pixels must have the shape \(B, 3, height, width\), got \(7, 1, 16, 16\)"):
        meter.measure(pixels[:, :1])
    with pytest.raises(ValueError, match="there are no images to reconstruct"):
        meter.result()
