"""The adversary, LPIPS, metrics and the stop at NaN (equality with the authors' code: test_golden_losses.py)."""

import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from number_training import logged, run_training
from PIL import Image
from processes import run
from tiny import tiny_pixels, tiny_vae
from torch import nn

from rq_hf.data import Collator, TrainingStream, prepare_images
from rq_hf.training import OptimizationArguments, create_accelerator, train
from rq_hf.training.adversarial import Adversary, PatchDiscriminator, adaptive_weight


def make_adversary(**options):
    options = {"optimizer_kwargs": {"lr": 1e-2}} | options
    adversary = Adversary(PatchDiscriminator(width=4, num_layers=1), **options)
    adversary.prepare(Accelerator(cpu=True))
    return adversary


def step(adversary, vae, pixels):
    """One step of the adversary against a fixed RQ-VAE; the loss that it has for it, and its metrics."""
    sample = vae(pixels).sample
    reconstruction = F.mse_loss(sample, pixels)
    loss, metrics = adversary.generator_loss(pixels, sample, reconstruction, vae.decoder.conv_out.weight)
    metrics |= adversary.compute_loss()
    adversary.update()
    return loss, metrics


class TestAdversary:
    def test_learns_to_tell_reconstructions_from_pictures(self):
        vae, adversary, pixels = tiny_vae(), make_adversary(), tiny_pixels(8, 16, 16)
        gaps = []
        for _ in range(30):
            _, metrics = step(adversary, vae, pixels)
            gaps.append((metrics["logits_real"] - metrics["logits_fake"]).item())
        assert gaps[-1] > gaps[0] + 0.5

    def test_pulls_as_hard_as_the_reconstruction(self):
        vae, pixels = tiny_vae(), tiny_pixels(2, 16, 16)
        sample = vae(pixels).sample
        last_layer, reconstruction = vae.decoder.conv_out.weight, F.mse_loss(sample, pixels)
        loss, _ = make_adversary(weight=0.5).generator_loss(pixels, sample, reconstruction, last_layer)
        norms = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (loss, reconstruction)]
        torch.testing.assert_close(norms[0], 0.5 * norms[1], rtol=0.05, atol=0)

    def test_starts_late_and_reaches_the_rqvae_later(self):
        vae, adversary, pixels = tiny_vae(), make_adversary(start=2, warmup_steps=2), tiny_pixels(2, 16, 16)
        first = {name: w.clone() for name, w in adversary.discriminator.state_dict().items()}
        seen = []
        for _ in range(5):
            learned = any(not torch.equal(w, first[name]) for name, w in adversary.discriminator.state_dict().items())
            loss, metrics = step(adversary, vae, pixels)
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
        vae, adversary, pixels = tiny_vae(), make_adversary(), tiny_pixels(2, 16, 16)
        sample = vae(pixels).sample
        loss, _ = adversary.generator_loss(pixels, sample, F.mse_loss(sample, pixels), vae.decoder.conv_out.weight)
        loss.backward()
        assert all(p.grad is None and p.requires_grad for p in adversary.discriminator.parameters())
        assert vae.decoder.conv_out.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PatchDiscriminator(norm="group"), "norm must be 'batch' or 'act', got 'group'"),
            (lambda: PatchDiscriminator(num_layers=0), "at least 1, got 3, 64 and 0"),
            (lambda: Adversary(PatchDiscriminator(), loss="wgan"), "loss must be 'hinge' or 'vanilla', got 'wgan'"),
        ],
    )
    def test_refuses(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class Exploding(nn.Module):
    """The regression of test_training until its third batch, then NaN."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.calls = 0

    def forward(self, numbers):
        self.calls += 1
        return self.network(numbers[:, None]).squeeze(-1) / (self.calls < 4)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    outcome = run(run_training, tmp_path, {}, Exploding)
    assert outcome.code != 0
    assert f"at step 4; the last checkpoint is {tmp_path / 'checkpoint-2'}" in outcome.output
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / "weights-0.pt").exists()
    assert max(logged(tmp_path)) == 3


def train_with_a_broken_discriminator(output_dir):
    """Its first loss is NaN: neither model may have changed."""
    args = OptimizationArguments(str(output_dir), max_train_steps=1, train_batch_size=2, cpu=True, report_to="none")
    accelerator = create_accelerator(args)
    vae = tiny_vae().train()
    adversary = Adversary(PatchDiscriminator(width=4, num_layers=1), optimizer_kwargs={"lr": 1.0}, warmup_steps=1)
    torch.nn.init.constant_(adversary.discriminator.main[0].bias, math.nan)
    models = (vae.decoder, adversary.discriminator.main[-1])
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]

    def compute_loss(model, batch):
        sample = model(batch["pixels"]).sample
        loss = F.mse_loss(sample, batch["pixels"])
        generator_loss, metrics = adversary.generator_loss(batch["pixels"], sample, loss, vae.decoder.conv_out.weight)
        return loss + generator_loss, metrics

    examples = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]})
    stream = TrainingStream(prepare_images(examples, "image"), Collator("image", 8), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="loss_discriminator is nan at step 1"):
        train(accelerator, args, vae, stream, compute_loss, dict, {}, codes_per_image=1, adversary=adversary)
    for model, state in zip(models, before):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_no_optimizer_has_stepped_when_a_loss_of_the_discriminator_is_not_finite(tmp_path):
    outcome = run(train_with_a_broken_discriminator, tmp_path)
    assert outcome.code == 0, outcome.output
