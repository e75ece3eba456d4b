import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import D, K, same_state, tiny_pixels, tiny_vae

from rq_hf.metrics import LPIPS, codebook_usage, count_codes, psnr
from rq_hf.training import RQVAELoss, initialize_codebook
from rq_hf.training.rq_vae import reconstruction_grid, reconstructions, validation_metrics


@pytest.fixture
def pixels():
    return tiny_pixels(4, 16, 16)


class TestRQVAELoss:
    @pytest.mark.parametrize(("name", "distance"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
    def test_is_reconstruction_and_commitment(self, pixels, name, distance):
        vae = tiny_vae()
        output = RQVAELoss(vae, reconstruction_loss=name, commitment_weight=0.5)(vae, {"pixels": pixels})
        expected = vae(pixels)
        reconstruction = distance(expected.sample, pixels)
        torch.testing.assert_close(output.loss, reconstruction + 0.5 * expected.commitment_loss)
        torch.testing.assert_close(output.metrics["loss_reconstruction"], reconstruction)

    def test_adds_lpips(self, pixels):
        vae, lpips = tiny_vae(), LPIPS()
        output = RQVAELoss(vae, perceptual=lpips, perceptual_weight=3.0)(vae, {"pixels": pixels})
        without = RQVAELoss(vae)(vae, {"pixels": pixels}).loss
        expected = lpips(vae(pixels).sample, pixels).mean()
        torch.testing.assert_close(output.loss - without, 3 * expected)
        torch.testing.assert_close(output.metrics["loss_perceptual"], expected)

    def test_adds_the_codebook_loss_of_a_codebook_trained_by_gradient(self, pixels):
        vae = tiny_vae(codebook_update="gradient")
        output, expected = RQVAELoss(vae)(vae, {"pixels": pixels}), vae(pixels)
        reconstruction = F.mse_loss(expected.sample, pixels)
        torch.testing.assert_close(
            output.loss, reconstruction + 0.25 * expected.commitment_loss + expected.codebook_loss
        )

    def test_logs_psnr_and_codebook_usage_of_the_batch(self, pixels):
        vae = tiny_vae()
        metrics, expected = RQVAELoss(vae)(vae, {"pixels": pixels}).metrics, vae(pixels)
        torch.testing.assert_close(metrics["psnr"], psnr(pixels, expected.sample).mean())
        usage = codebook_usage(count_codes(expected.codes, K))
        for d in range(D):
            assert metrics[f"batch_usage_depth_{d + 1}"] == usage["usage"][d]
            assert metrics[f"batch_perplexity_depth_{d + 1}"] == usage["perplexity"][d]

    def test_refuses_another_reconstruction_loss(self):
        with pytest.raises(ValueError, match=r"reconstruction_loss must be one of \['mse', 'l1'\], got 'l2'"):
            RQVAELoss(tiny_vae(), reconstruction_loss="l2")


class TestValidationMetrics:
    def test_are_those_of_all_batches(self, pixels):
        vae, lpips = tiny_vae(), LPIPS()
        metrics = validation_metrics(vae, pixels.split([3, 1]), lpips)
        output = vae(pixels)
        assert metrics["validation/psnr"] == pytest.approx(psnr(pixels, output.sample).mean().item())
        assert metrics["validation/lpips"] == pytest.approx(lpips(output.sample.clamp(-1, 1), pixels).mean().item())
        usage = codebook_usage(count_codes(output.codes, K))["usage"].tolist()
        assert [metrics[f"validation/usage_depth_{d}"] for d in range(1, D + 1)] == pytest.approx(usage)

    def test_leave_out_lpips_without_its_weights(self, pixels):
        assert "validation/lpips" not in validation_metrics(tiny_vae(), [pixels])


def test_reconstructions_go_from_coarse_to_fine(pixels):
    vae = tiny_vae()
    images = reconstructions(vae, pixels).unflatten(0, (D + 1, 4))
    torch.testing.assert_close(images[0], pixels / 2 + 0.5)
    torch.testing.assert_close(images[-1], vae(pixels).sample / 2 + 0.5)
    torch.testing.assert_close(images[1], vae.decode_codes(vae.get_codes(pixels), depth=1).sample / 2 + 0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_grid_has_a_row_for_every_image(channels):
    vae = tiny_vae(in_channels=channels, out_channels=channels, mid_block_add_attention=False)
    pixels = tiny_pixels(2, 128, 128, channels)
    grid = reconstruction_grid(vae, pixels)
    cell_width, cell_height = grid.width // (D + 1), grid.height // 2
    images = reconstructions(vae, pixels).clamp(0, 1).expand(-1, 3, -1, -1).unflatten(0, (D + 1, 2))
    for d in range(D + 1):
        for i in range(2):
            left, top = d * cell_width + (cell_width - 128) // 2, i * cell_height + 8
            shown = np.asarray(grid.crop((left, top, left + 128, top + 128))) / 255
            np.testing.assert_allclose(shown.transpose(2, 0, 1), images[d, i], atol=0.6 / 255)
            legend = grid.crop((left, top + 128, left + 128, (i + 1) * cell_height))
            assert legend.convert("L").getextrema()[0] < 128


def test_first_codebook_is_the_k_means_of_the_features(pixels):
    vae, other = tiny_vae(), tiny_vae()
    other.load_state_dict(vae.state_dict())
    torch.manual_seed(0)
    initialize_codebook(vae, pixels.split(2))
    torch.manual_seed(0)
    other.quantizer.initialize(other.encode_to_vectors(pixels).detach())
    assert same_state(vae, other)
