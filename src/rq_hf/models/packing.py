"""Blocks whose weights are laid out for oneDNN: on a CPU several times as fast for few rows."""

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
        inputs = inputs.to(self.packed.dtype)
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


def pack_linear_maps(module: nn.Module) -> None:
    """Replaces every `nn.Linear` inside `module`, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linear_maps(child)


def fuse_block(block: nn.Module) -> None:
    """Has a transformer block of packed linear maps compute in fewer operations, in place."""
    block.forward = partial(fused_forward, block)


def fused_forward(block: nn.Module, hidden_states: torch.Tensor, cache=None) -> torch.Tensor:
    """`RQBlock.forward` without dropout. GELU and sums are part of the linear maps, and submodules are not *called*:
    for one image the calls take as long as the arithmetic."""
    attention, mlp = block.self_attn, block.mlp
    batch_size, length, hidden_size = hidden_states.shape
    qkv = attention.qkv_proj.forward(layer_norm(block.attention_norm, hidden_states))
    qkv = qkv.view(batch_size, length, 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, dim)
    query, (key, value) = qkv[0], qkv[1:] if cache is None else cache.update(qkv[1:], attention.layer_idx)
    output = F.scaled_dot_product_attention(query.to(key.dtype), key, value, is_causal=length > 1)
    output = output.transpose(1, 2).reshape(batch_size, length, hidden_size)
    hidden_states = attention.o_proj.forward(output, add=hidden_states)
    inputs = layer_norm(block.mlp_norm, hidden_states)
    if attention.config.hidden_act == "gelu":
        inner = mlp.up_proj.forward(inputs, activation="gelu")
    else:
        inner = mlp.act_fn(mlp.up_proj.forward(inputs))
    return mlp.down_proj.forward(inner, add=hidden_states)


def layer_norm(norm: nn.LayerNorm, inputs: torch.Tensor) -> torch.Tensor:
    return torch.layer_norm(inputs, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
