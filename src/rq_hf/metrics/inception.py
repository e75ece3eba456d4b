"""
The Inception network of FID and the Inception Score (Szegedy et al. 2016, Salimans et al. 2016, Heusel et al. 2017).

It is TensorFlow's graph `inception-2015-12-05`. Unlike `inception_v3` of torchvision it has 1008 classes and other
weights, its average pooling leaves the padding out of the average, and its last block takes the maximum instead.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..argument_checks import check_floating
from .weights import read_weights

SIDE = 299
NUM_FEATURES, NUM_CLASSES = 2048, 1008

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)

# The branches of a block: (channels, kernel, stride) of one convolution after the other; a list has two side by side.
# The branch "_pool" follows the pooling of the block; a block without it gives out the pooled input itself.


def block_a(channels: int) -> dict:
    return {
        "1x1": [(64, 1)],
        "5x5": [(48, 1), (64, 5)],
        "3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "_pool": [(channels, 1)],
    }


def block_c(channels: int) -> dict:
    row, column = (channels, (1, 7)), (channels, (7, 1))
    return {
        "1x1": [(192, 1)],
        "7x7": [(channels, 1), row, (192, (7, 1))],
        "7x7dbl": [(channels, 1), column, row, column, (192, (1, 7))],
        "_pool": [(192, 1)],
    }


BLOCK_B = {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
BLOCK_D = {"3x3": [(192, 1), (320, 3, 2)], "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}
BLOCK_E = {
    "1x1": [(320, 1)],
    "3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "_pool": [(192, 1)],
}


class FIDInception(nn.Module):
    """
    Pixels `(B, 3, 299, 299)` in [-1, 1] -> features `(B, 2048)`, the averages of the last feature map, and logits
    `(B, 1008)`.

    Modules have the names of torchvision and of pytorch-fid 0.3.0, whose `fid_inception_v3` this is.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = convolution(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed(192, average_pool, block_a(32))
        self.Mixed_5c = Mixed(256, average_pool, block_a(64))
        self.Mixed_5d = Mixed(288, average_pool, block_a(64))
        self.Mixed_6a = Mixed(288, halve, BLOCK_B)
        self.Mixed_6b = Mixed(768, average_pool, block_c(128))
        self.Mixed_6c = Mixed(768, average_pool, block_c(160))
        self.Mixed_6d = Mixed(768, average_pool, block_c(160))
        self.Mixed_6e = Mixed(768, average_pool, block_c(192))
        self.Mixed_7a = Mixed(768, halve, BLOCK_D)
        self.Mixed_7b = Mixed(1280, average_pool, BLOCK_E)
        self.Mixed_7c = Mixed(2048, max_pool, BLOCK_E)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: Path) -> "FIDInception":
        """With the weights in a file. Raises `ValueError` if some are missing or have other shapes."""
        with torch.device("meta"):
            model = cls()
        weights = model.to_empty(device="cpu").state_dict()
        shapes = {name: weight.shape for name, weight in weights.items() if not name.endswith("num_batches_tracked")}
        model.load_state_dict(weights | read_weights(path, shapes))
        return model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_floating("pixels", pixels, "B", 3, SIDE, SIDE)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, self.fc(features)


class Mixed(nn.Module):
    """Branches side by side, whose outputs are concatenated."""

    def __init__(self, in_channels: int, pool: Callable[[torch.Tensor], torch.Tensor], branches: dict[str, list]):
        super().__init__()
        self.pool = pool
        self.steps = {branch: [] for branch in branches}  # the names of the convolutions
        for branch, convolutions in branches.items():
            channels = in_channels
            for number, step in enumerate(convolutions, start=1):
                fork = step if isinstance(step, list) else [step]
                name = f"branch{branch}_{number}" if len(convolutions) > 1 else f"branch{branch}"
                names = [name + letter for letter in ("ab" if len(fork) == 2 else [""])]
                for name, settings in zip(names, fork):
                    self.add_module(name, convolution(channels, *settings))
                self.steps[branch].append(names)
                channels = sum(settings[0] for settings in fork)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(x)
        outputs = []
        for branch, steps in self.steps.items():
            y = pooled if branch == "_pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs if "_pool" in self.steps else [*outputs, pooled], dim=1)


def convolution(
    in_channels: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | str | None = None
) -> nn.Sequential:
    """Convolution, normalization, ReLU. By default, padding keeps the size at stride 1, and there is none at 2."""
    if padding is None:
        padding = "same" if stride == 1 else 0
    layers = {
        "conv": nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False),
        "bn": nn.BatchNorm2d(channels, eps=0.001),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))
