"""Blocks of diffusers' autoencoders for inference: fewer operations, computed in place."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn


def fuse_blocks(module: nn.Module) -> None:
    """Replaces diffusers' residual and upsampling blocks inside `module`, in place; names of weights stay."""
    for name, child in module.named_children():
        if isinstance(child, ResnetBlock2D):
            setattr(module, name, FusedResnetBlock(child))
        elif isinstance(child, Upsample2D):
            setattr(module, name, FusedUpsample(child))
        else:
            fuse_blocks(child)


class FusedResnetBlock(nn.Module):
    """`ResnetBlock2D` of an autoencoder, without dropout. `(B, C, H, W)` -> `(B, C', H, W)`"""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, hidden_states: torch.Tensor, temb: None = None) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden_states), inplace=True))
        inner = self.conv2(F.silu(self.norm2(inner), inplace=True))
        return inner.add_(hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states))


class FusedUpsample(nn.Module):
    """`Upsample2D` of an autoencoder. `(B, C, H, W)` -> `(B, C', 2·H, 2·W)`"""

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        self.conv = UpsamplingConv2d(upsample.conv)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class UpsamplingConv2d(nn.Module):
    """
    Nearest-neighbour upsampling followed by a 3×3 convolution, `(B, C, H, W)` -> `(B, C', 2·H, 2·W)`, as one
    transposed convolution: 4 products per output pixel instead of 9.

    A state dict has the weight `(C', C, 3, 3)` of the convolution.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("transposed", None, persistent=False)  # (C, C', 4, 4)
        self.transpose()

    def transpose(self) -> None:
        """After upsampling, a 3×3 window covers 2×2 input pixels; weights on the same pixel are summed."""
        weight = self.weight.detach()
        taps = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(0, 1)[:, None]
        taps = F.conv2d(taps, torch.ones_like(taps[:1, :, :2, :2]), padding=1)
        taps = taps.view(*weight.shape[:2], 4, 4).flip(-1, -2).transpose(0, 1)
        self.transposed = taps.to(weight.dtype).contiguous(memory_format=torch.channels_last)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("fused blocks cannot be trained; reload the model")
        return F.conv_transpose2d(hidden_states, self.transposed, self.bias, stride=2, padding=1)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.transpose()
