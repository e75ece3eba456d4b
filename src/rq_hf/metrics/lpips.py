"""LPIPS, the learned perceptual distance (Zhang et al., CVPR 2018), on VGG16 features."""

import torch
import torch.nn.functional as F
from torch import nn

from ..argument_checks import check_floating
from .weights import find_weights, read_weights

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)  # the last activation before each pooling layer, and the last activation
SMALLEST_SIDE = 2 ** VGG16.count("pool")
WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """
    Distance between images in VGG16 feature space: squared differences of normalized features at five depths, weighted
    per channel, averaged over positions and summed over depths (eq. 1).

    All arithmetic is float32, also under autocast. The weights are frozen.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        layers, channels = [], 3
        for width in VGG16:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Conv2d(width, 1, 1, bias=False) for width in WIDTHS])
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, vgg: str, heads: str) -> "LPIPS":
        """
        Args:
            vgg: weights of VGG16 with the names of torchvision, `features.0.weight` and so on.
            heads: the weights per channel, `lin0.model.1.weight` to `lin4.model.1.weight`, as released with LPIPS.

        Both are local files, or `user/repository/file` on the Hub, in the format of safetensors (`.safetensors`) or
        `torch.save`. Raises `ValueError` for a source that is neither, and if weights are missing or of other shapes.
        """
        model = cls()
        state_dict = model.state_dict()
        for source, names in (
            (vgg, {name: name for name in state_dict if name.startswith("features.")}),
            (heads, {f"heads.{i}.weight": f"lin{i}.model.1.weight" for i in range(len(WIDTHS))}),
        ):
            shapes = {theirs: state_dict[ours].shape for ours, theirs in names.items()}
            weights = read_weights(find_weights(source), shapes)
            state_dict.update({ours: weights[theirs] for ours, theirs in names.items()})
        model.load_state_dict(state_dict)
        return model

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, pixels: torch.Tensor, other_pixels: torch.Tensor) -> torch.Tensor:
        """Distances `(B,)` between images `(B, 3, height, width)`, or grey `(B, 1, height, width)`, in [-1, 1]."""
        check_floating("pixels", pixels, "B", "channels", "height", "width")
        check_floating("other_pixels", other_pixels, *pixels.shape)
        if pixels.shape[1] not in (1, 3):
            raise ValueError(f"pixels must have 3 channels, or 1 for grey images, got {tuple(pixels.shape)}")
        if min(pixels.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"pixels must be at least {SMALLEST_SIDE} high and wide, got {tuple(pixels.shape)}")
        with torch.autocast(pixels.device.type, enabled=False):
            pairs = zip(self.extract(pixels), self.extract(other_pixels), strict=True)
            return sum(
                head((a - b).square()).mean(dim=(1, 2, 3)) for head, (a, b) in zip(self.heads, pairs, strict=True)
            )

    def extract(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The features at the five depths, normalized to unit length over the channels at each position."""
        features, tapped = (pixels.float() - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            features = layer(features)
            if i in TAPS:
                tapped.append(F.normalize(features, dim=1, eps=1e-10))
        return tapped
