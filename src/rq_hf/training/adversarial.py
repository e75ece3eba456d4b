"""The adversarial loss of stage 1: PatchGAN with the adaptive weight of VQ-GAN (Esser et al. 2021, section 3.1).

Pixels are `(B, 3, height, width)` in [-1, 1]; the discriminator's logits `(B, 1, h, w)`, positive for "real".
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..argument_checks import LARGEST_SIZE, check_choice, check_integer, check_number, check_size
from .loop import TrainingHook, continue_schedule


class ActNorm(nn.Module):
    """Affine per channel (Kingma & Dhariwal 2018); the first training batch sets it to mean 0, deviation 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-features.mean(dim=(0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (features.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (features + self.loc)


class PatchDiscriminator(nn.Module):
    """
    PatchGAN (Isola et al. 2017): tells real from reconstructed, patch by patch. Pixels -> logits `(B, 1, h, w)`.

    Args:
        in_channels (`int`): channels of the images.
        width (`int`): channels of the first layer; they double with every layer, up to eight times as many.
        num_layers (`int`): layers that halve the height and width.
        norm (`str`): `"batch"` or `"act"`, [`ActNorm`].
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 2, norm: str = "batch"):
        super().__init__()
        check_choice("norm", norm, ("batch", "act"))
        for name, size in (("in_channels", in_channels), ("width", width), ("num_layers", num_layers)):
            check_size(name, size)
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=norm == "act"),
                nn.BatchNorm2d(widths[i]) if norm == "batch" else ActNorm(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.main(pixels)


def hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """Discriminator loss ½·(E[max(0, 1 − real)] + E[max(0, 1 + fake)])."""
    return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2


def vanilla_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """Discriminator loss ½·(E[softplus(−real)] + E[softplus(fake)]), the binary cross-entropy."""
    return (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()) / 2


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor, maximum: float = 1e4
) -> torch.Tensor:
    """
    λ = ‖∇ reconstruction‖ / (‖∇ generator‖ + 10⁻⁴) with respect to the decoder's last layer, in [0, maximum], detached
    (Esser et al. 2021, eq. 7): both losses then pull equally hard.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, generator_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, maximum).detach()


class DiscriminatorTrainer(TrainingHook):
    """
    Trains the discriminator and provides the adversarial loss of the autoencoder.

    [`LossOutput.outputs`] must be the pixels and their reconstructions, both `(B, 3, height, width)`.

    Args:
        accelerator: that of the run.
        discriminator: it learns from step `start` on, and its loss reaches the autoencoder `warmup_steps` later, once
            it is informative.
        optimizer, scheduler: of the discriminator.
        loss (`str`): `"hinge"` or `"vanilla"`, of the discriminator; that of the autoencoder is −E[logits of fakes].
        weight (`float`): of both losses, besides the adaptive weight of the autoencoder's.
        max_adaptive_weight (`float`): bound of the adaptive weight, which grows without limit where the gradient of
            the discriminator vanishes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: PatchDiscriminator,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        loss: str = "hinge",
        weight: float = 0.75,
        start: int = 0,
        warmup_steps: int = 0,
        max_adaptive_weight: float = 1e4,
    ):
        check_choice("loss", loss, ("hinge", "vanilla"))
        check_number("weight", weight, "be at least 0")
        check_integer("start", start, 0, LARGEST_SIZE)
        check_integer("warmup_steps", warmup_steps, 0, LARGEST_SIZE)
        check_number("max_adaptive_weight", max_adaptive_weight, "be greater than 0")
        self.accelerator = accelerator
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss = hinge_loss if loss == "hinge" else vanilla_loss
        self.weight = weight
        self.start = start
        self.warmup_steps = warmup_steps
        self.max_adaptive_weight = max_adaptive_weight
        self.modules = (discriminator,)
        self.num_steps = 0

    def prepare(self, model: nn.Module) -> None:
        prepared, self.optimizer = self.accelerator.prepare(self.discriminator, self.optimizer)
        # DDP would overwrite batch norm statistics that the backward pass of an earlier forward pass still needs.
        prepared.broadcast_buffers = False
        self.modules = (prepared,)
        self.accelerator.register_for_checkpointing(self)

    def generator_loss(
        self, sample: torch.Tensor, reconstruction_loss: torch.Tensor, last_layer: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Adversarial term of the autoencoder's loss, and metrics.

        Args:
            sample: reconstructions `(B, 3, height, width)`.
            reconstruction_loss, last_layer: see [`adaptive_weight`].
        """
        if self.num_steps < self.start + self.warmup_steps:
            return sample.new_zeros(()), {}
        # Bypasses the DDP wrapper: no gradients of the discriminator are needed here.
        self.discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            loss = -self.discriminator(sample).float().mean()
        self.discriminator.requires_grad_(True)
        adaptive = adaptive_weight(reconstruction_loss, loss, last_layer, self.max_adaptive_weight)
        return self.weight * adaptive * loss, {"loss_generator": loss, "adaptive_weight": adaptive}

    def compute_losses(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The discriminator's loss and mean logits on pixels and reconstructions; nothing before step `start`."""
        if self.num_steps < self.start:
            return {}
        pixels, sample = outputs
        (discriminator,) = self.modules
        with self.accelerator.autocast():
            logits_fake, logits_real = discriminator(sample.detach()).float(), discriminator(pixels).float()
        return {
            "loss_discriminator": self.loss(logits_real, logits_fake),
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }

    def step(self, losses: dict[str, torch.Tensor]) -> None:
        if losses:
            self.accelerator.backward(self.weight * losses["loss_discriminator"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.scheduler.step()
        self.num_steps += self.accelerator.sync_gradients

    def state_dict(self) -> dict:
        return {"step": self.num_steps, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.num_steps = state["step"]
        peak_learning_rates = self.scheduler.base_lrs
        self.scheduler.load_state_dict(state["scheduler"])
        continue_schedule(self.scheduler, peak_learning_rates)
