"""Faster inference: weights laid out for oneDNN (on a CPU), blocks that compute in fewer operations and in place."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
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
