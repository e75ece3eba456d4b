"""A small classifier of 32×32 images: features and class accuracies without anything to download."""

from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from ..argument_checks import check_floating, check_size, check_values

SIDE = 32
CIFAR10_FOLDER = Path(__file__).parents[1] / "cifar10_classifier"


class SmallClassifier(
    nn.Module, PyTorchModelHubMixin, library_name="rq_hf", pipeline_tag="image-classification", tags=["resnet-9"]
):
    """
    A residual network of 9 layers and 1.3 M parameters, a quarter of the size of "ResNet-9" (D. Page, "How to train
    your ResNet", 2018). A forward pass takes 90 M multiplications per image.

    Args:
        num_classes: number of logits.
    """

    num_features = 224

    def __init__(self, num_classes: int = 10):
        super().__init__()
        check_size("num_classes", num_classes)
        self.layers = nn.Sequential(
            convolution(3, 32),
            convolution(32, 64),
            nn.MaxPool2d(2),
            Residual(64),
            convolution(64, 128),
            nn.MaxPool2d(2),
            convolution(128, self.num_features),
            nn.MaxPool2d(2),
            Residual(self.num_features),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(self.num_features, num_classes)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs) -> "SmallClassifier":
        # The mixin's default leaves weights that the file lacks as they were initialized.
        return super()._from_pretrained(strict=strict, **kwargs).eval()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, 32, 32)` in [-1, 1] -> features `(B, F)`, F = `num_features`."""
        check_floating("pixels", pixels, "B", 3, SIDE, SIDE)
        check_values("pixels", pixels)
        return self.layers(pixels.to(self.classifier.weight.dtype))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, 32, 32)` in [-1, 1] -> logits `(B, num_classes)`."""
        return self.classifier(self.features(pixels))


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class Residual(nn.Module):
    """x -> x + f(x), f being two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)
