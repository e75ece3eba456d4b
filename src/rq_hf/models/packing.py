"""Faster inference: weights laid out for oneDNN (on a CPU), blocks that compute in fewer operations and in place."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn


class PackedLinear(nn.Module):
    """
    `nn.Linear` for inference on a CPU. In a state dict it has the weight that it was made of.

    Raises `ValueError` when it is to be moved or cast.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor, activation: str = "none", add: torch.Tensor | None = None) -> torch.Tensor:
        """The linear map, followed by `"none"`, `"relu"` or the exact `"gelu"`, or by adding a tensor."""
        if add is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(inputs, add, self.packed, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise.default(inputs, self.packed, self.bias, activation, [], "none")

    def _apply(self, fn, recurse=True):
        moved = fn(torch.empty(0, dtype=self.packed.dtype))
        if (moved.device.type, moved.dtype) != ("cpu", self.packed.dtype):
            raise ValueError(
                f"packed weights stay on the CPU in {self.packed.dtype}, got {moved.device} and {moved.dtype}: "
                "load the model anew"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.packed.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def check_plain(linear_maps: Iterable[nn.Module]) -> None:
    """Raises `ValueError` where linear maps are quantized, wrapped by adapters, or not in memory."""
    for linear in linear_maps:
        kind = type(linear.weight) if type(linear) is nn.Linear else type(linear)
        if kind is not nn.Parameter:
            raise ValueError(f"plain weights are packed, got {kind}: merge adapters, or load without quantization")
        if linear.weight.is_meta:
            raise ValueError("weights are packed in memory; those of this model are on disk, or on the meta device")


def pack_linear_maps(module: nn.Module) -> None:
    """Replaces every `nn.Linear` inside `module`, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linear_maps(child)


class FusedForward:
    """`RQBlock.forward` without dropout. GELU and sums are part of the linear maps, and no module is *called* or even
    looked up: for one image that takes as long as the arithmetic."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.layer_idx, self.head_dim = attention.layer_idx, attention.head_dim
        self.attention_norm, self.mlp_norm = layer_norm(block.attention_norm), layer_norm(block.mlp_norm)
        self.qkv_proj, self.o_proj = attention.qkv_proj.forward, attention.o_proj.forward
        self.up_proj, self.down_proj = mlp.up_proj.forward, mlp.down_proj.forward
        self.act_fn = None if attention.config.hidden_act == "gelu" else mlp.act_fn

    def __call__(self, hidden_states: torch.Tensor, cache=None) -> torch.Tensor:
        batch_size, length, hidden_size = hidden_states.shape
        qkv = self.qkv_proj(self.attention_norm(hidden_states)).view(batch_size, length, 3, -1, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, dim)
        query, keys_values = qkv[0], qkv[1:]
        key, value = keys_values if cache is None else cache.update(keys_values, self.layer_idx)
        output = F.scaled_dot_product_attention(query.to(key.dtype), key, value, is_causal=length > 1)
        output = output.transpose(1, 2).reshape(batch_size, length, hidden_size)
        hidden_states = self.o_proj(output.to(hidden_states.dtype), add=hidden_states)
        inputs = self.mlp_norm(hidden_states)
        if self.act_fn is None:
            return self.down_proj(self.up_proj(inputs, activation="gelu"), add=hidden_states)
        return self.down_proj(self.act_fn(self.up_proj(inputs)), add=hidden_states)


def layer_norm(norm: nn.LayerNorm) -> Callable:
    return partial(
        torch.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


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
