"""Blocks of diffusers' autoencoders that compute in fewer operations and in place, for inference."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn


def fuse_autoencoder(model: nn.Module) -> None:
    """Has diffusers' residual blocks and upsampling inside `model` compute in fewer operations, in place."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = partial(fused_resnet_forward, module)
        elif isinstance(module, Upsample2D) and not isinstance(module.conv, UpsamplingConv2d):
            module.conv = UpsamplingConv2d(module.conv)
            module.forward = partial(fused_upsample_forward, module)


def fused_resnet_forward(block: ResnetBlock2D, hidden_states: torch.Tensor, temb: None = None) -> torch.Tensor:
    """`ResnetBlock2D.forward` of an autoencoder, `(B, C, H, W)` -> `(B, C', H, W)`, without dropout."""
    inner = block.conv1(F.silu(block.norm1(hidden_states), inplace=True))
    inner = block.conv2(F.silu(block.norm2(inner), inplace=True))
    return inner.add_(hidden_states if block.conv_shortcut is None else block.conv_shortcut(hidden_states))


def fused_upsample_forward(upsample: Upsample2D, hidden_states: torch.Tensor) -> torch.Tensor:
    return upsample.conv(hidden_states)


class UpsamplingConv2d(nn.Module):
    """
    The 3×3 convolution of a picture whose pixels are doubled, `(B, C, H, W)` -> `(B, C', 2·H, 2·W)`, as one transposed
    convolution of the picture itself: four products for every new pixel instead of nine. For inference.

    In a state dict it has the weight `(C', C, 3, 3)` that it was made of.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("transposed", None, persistent=False)  # (C, C', 4, 4)
        self.transpose()

    def transpose(self) -> None:
        """The 3×3 window sees two pixels in each direction: weights that meet the same one are added up."""
        weight = self.weight.detach()
        taps = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(0, 1)[:, None]
        taps = F.conv2d(taps, torch.ones_like(taps[:1, :, :2, :2]), padding=1)
        taps = taps.view(*weight.shape[:2], 4, 4).flip(-1, -2).transpose(0, 1)
        self.transposed = taps.to(weight.dtype).contiguous(memory_format=torch.channels_last)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("fused blocks are not trained: load the model anew")
        return F.conv_transpose2d(pixels, self.transposed, self.bias, stride=2, padding=1)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.transpose()
