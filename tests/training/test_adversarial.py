"""The discriminator and its trainer (equality with the authors' code: test_golden_losses.py)."""

import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from processes import run
from tiny import tiny_pixels, tiny_vae
from transformers import get_constant_schedule

from rq_hf.data import ImageCollator, TrainingStream, prepare_images
from rq_hf.training import (
    Checkpoints,
    DiscriminatorTrainer,
    PatchDiscriminator,
    RQVAELoss,
    create_accelerator,
    train,
)
from rq_hf.training.adversarial import adaptive_weight


def make_trainer(accelerator=None, learning_rate=1e-2, **options):
    discriminator = PatchDiscriminator(width=4, num_layers=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=learning_rate)
    accelerator = accelerator or Accelerator(cpu=True)
    return DiscriminatorTrainer(accelerator, discriminator, optimizer, get_constant_schedule(optimizer), **options)


def step(trainer, vae, pixels):
    """One step of the discriminator against a fixed RQ-VAE; its loss for the RQ-VAE, and all metrics."""
    sample = vae(pixels).sample
    reconstruction = F.mse_loss(sample, pixels)
    loss, metrics = trainer.generator_loss(sample, reconstruction, vae.decoder.conv_out.weight)
    losses = trainer.compute_losses((pixels, sample))
    trainer.step(losses)
    return loss, metrics | losses


class TestDiscriminatorTrainer:
    def test_learns_to_tell_reconstructions_from_images(self):
        vae, trainer, pixels = tiny_vae(), make_trainer(), tiny_pixels(8, 16, 16)
        gaps = []
        for _ in range(30):
            _, metrics = step(trainer, vae, pixels)
            gaps.append((metrics["logits_real"] - metrics["logits_fake"]).item())
        assert gaps[-1] > gaps[0] + 0.5

    def test_resumed_with_another_learning_rate_uses_it(self):
        saved, resumed = make_trainer(), make_trainer(learning_rate=1e-3)
        resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
        resumed.load_state_dict(saved.state_dict())
        assert [group["lr"] for group in resumed.optimizer.param_groups] == [1e-3]

    def test_pulls_as_hard_as_the_reconstruction(self):
        vae, pixels = tiny_vae(), tiny_pixels(2, 16, 16)
        sample = vae(pixels).sample
        last_layer, reconstruction = vae.decoder.conv_out.weight, F.mse_loss(sample, pixels)
        loss, _ = make_trainer(weight=0.5).generator_loss(sample, reconstruction, last_layer)
        norms = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (loss, reconstruction)]
        torch.testing.assert_close(norms[0], 0.5 * norms[1], rtol=0.05, atol=0)

    def test_starts_late_and_reaches_the_rqvae_later(self):
        vae, trainer, pixels = tiny_vae(), make_trainer(start=2, warmup_steps=2), tiny_pixels(2, 16, 16)
        first = {name: w.clone() for name, w in trainer.discriminator.state_dict().items()}
        seen = []
        for _ in range(5):
            learned = any(not torch.equal(w, first[name]) for name, w in trainer.discriminator.state_dict().items())
            loss, metrics = step(trainer, vae, pixels)
            seen.append((learned, "loss_discriminator" in metrics, "loss_generator" in metrics, loss.item() != 0))
        assert seen == [
            (False, False, False, False),
            (False, False, False, False),
            (False, True, False, False),
            (True, True, False, False),
            (True, True, True, True),
        ]

    def test_weight_is_bounded(self):
        last_layer = torch.ones(3, requires_grad=True)
        loss, nothing_to_say = last_layer.square().sum(), 0 * last_layer.sum()
        assert adaptive_weight(loss, nothing_to_say, last_layer) == 1e4
        assert adaptive_weight(loss, nothing_to_say, last_layer, maximum=7.0) == 7

    def test_leaves_no_gradients_in_the_discriminator(self):
        vae, trainer, pixels = tiny_vae(), make_trainer(), tiny_pixels(2, 16, 16)
        sample = vae(pixels).sample
        loss, _ = trainer.generator_loss(sample, F.mse_loss(sample, pixels), vae.decoder.conv_out.weight)
        loss.backward()
        assert all(p.grad is None and p.requires_grad for p in trainer.discriminator.parameters())
        assert vae.decoder.conv_out.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PatchDiscriminator(norm="group"), r"norm must be one of \['batch', 'act'\], got 'group'"),
            (lambda: PatchDiscriminator(num_layers=0), "num_layers must be at least 1, got 0"),
            (lambda: make_trainer(loss="wgan"), r"loss must be one of \['hinge', 'vanilla'\], got 'wgan'"),
        ],
    )
    def test_refuses(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


def train_with_a_broken_discriminator(output_dir):
    """Its first loss is NaN: neither model may have changed."""
    accelerator = create_accelerator(output_dir, cpu=True)
    vae = tiny_vae().train()
    trainer = make_trainer(accelerator, learning_rate=1.0, warmup_steps=1)
    torch.nn.init.constant_(trainer.discriminator.main[0].bias, math.nan)
    models = (vae.decoder, trainer.discriminator.main[-1])
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]

    optimizer = torch.optim.SGD(vae.parameters(), lr=1.0)
    examples = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]})
    stream = TrainingStream(prepare_images(examples, "image"), ImageCollator("image", 8), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="loss_discriminator is nan at step 1; there is no checkpoint yet"):
        train(
            accelerator,
            vae,
            optimizer,
            get_constant_schedule(optimizer),
            stream,
            RQVAELoss(vae, discriminator=trainer),
            hooks=[trainer],
            max_train_steps=1,
            checkpoints=Checkpoints(output_dir),
        )
    for model, state in zip(models, before):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_no_optimizer_has_stepped_when_a_loss_of_the_discriminator_is_not_finite(tmp_path):
    outcome = run(train_with_a_broken_discriminator, tmp_path)
    assert outcome.code == 0, outcome.output
