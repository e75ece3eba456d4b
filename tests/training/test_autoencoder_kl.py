import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from tiny import MAR_SCALE, C, tiny_kl, tiny_pixels

from rq_hf.metrics import LPIPS, psnr
from rq_hf.models.continuous_latents import autoencoder_kl_card, encode_moments, sample_latents
from rq_hf.training import AutoencoderKLForTraining, AutoencoderKLLoss, set_scaling_factor
from rq_hf.training.autoencoder_kl import validation_metrics


@pytest.fixture
def pixels():
    return tiny_pixels(4, 16, 16)


@pytest.fixture
def vae():
    return tiny_kl()


def divergence(posterior):
    """KL(posterior ‖ N(0, 1)) of each image, by torch."""
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    return torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))


class TestAutoencoderKLLoss:
    def test_is_reconstruction_and_divergence_per_pixel_value(self, vae, pixels):
        model = AutoencoderKLForTraining(vae)
        torch.manual_seed(1)
        output = AutoencoderKLLoss(model, reconstruction_loss="l1", kl_weight=0.5)(model, {"pixels": pixels})
        torch.manual_seed(1)
        posterior = vae.encode(pixels).latent_dist
        sample = vae.decode(posterior.sample()).sample
        kl = divergence(posterior).mean() / (3 * 16 * 16)
        torch.testing.assert_close(output.loss, F.l1_loss(sample, pixels) + 0.5 * kl)
        torch.testing.assert_close(output.metrics["loss_kl"], kl)
        torch.testing.assert_close(output.metrics["psnr"], psnr(pixels, sample.detach()).mean())
        torch.testing.assert_close(output.outputs, (pixels, sample))

    def test_reaches_all_weights_and_widens_the_posterior(self, vae, pixels):
        model = AutoencoderKLForTraining(vae)
        AutoencoderKLLoss(model, kl_weight=1.0)(model, {"pixels": pixels}).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
        assert vae.quant_conv.bias.grad[C:].abs().min() > 0

    def test_refuses_a_negative_weight(self, vae):
        with pytest.raises(ValueError, match="kl_weight must be at least 0, got -1"):
            AutoencoderKLLoss(AutoencoderKLForTraining(vae), kl_weight=-1)


@torch.no_grad()
def test_validation_metrics_are_those_of_the_means(vae, pixels):
    lpips = LPIPS()
    metrics = validation_metrics(vae, pixels.split([3, 1]), lpips)
    posterior = vae.encode(pixels).latent_dist
    sample = vae.decode(posterior.mode()).sample
    expected = {
        "validation/psnr": psnr(pixels, sample),
        "validation/lpips": lpips(sample.clamp(-1, 1), pixels),
        "validation/kl": divergence(posterior),
    }
    assert metrics == {name: pytest.approx(value.mean().item(), rel=1e-4) for name, value in expected.items()}


@torch.no_grad()
def test_scaled_latents_have_unit_variance(vae, pixels):
    set_scaling_factor(vae, pixels.split(3), seed=0)
    latents = sample_latents(vae, encode_moments(vae, pixels))
    assert latents.std().item() == pytest.approx(1, rel=0.05)
    assert vae.config.scaling_factor != MAR_SCALE


def test_card_says_what_the_model_is_and_how_to_use_it(vae):
    card = ModelCard(autoencoder_kl_card(vae, "runs/vae"))
    assert card.data.tags == ["autoencoder-kl", "image-tokenizer"]
    assert f"# AutoencoderKL 8² → 4×4×{C}" in card.text
    assert "latents = posterior.sample() * vae.config.scaling_factor" in card.text
