"""Weights packed for oneDNN, with which linear layers and transformer blocks are faster on a CPU."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from .offloading import check_not_group_offloaded


def pack_linear_layers(model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
    """
    Replaces the linear layers of `model` at these places, (parent, name), by packed ones; no weight of it can be
    trained any more.

    Raises `ValueError` on another device than a CPU, in another dtype than float32 and bfloat16, for weights that are
    quantized or offloaded, for adapters that are not merged, and without oneDNN.
    """
    check_not_group_offloaded(model)
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"weights can be packed on a CPU in float32 or bfloat16, got a model on {model.device} in {model.dtype}"
        )
    if not torch.backends.mkldnn.is_available():
        raise ValueError("weights are packed for oneDNN, which this build of torch lacks")
    places = list(places)
    for parent, name in places:
        check_packable(getattr(parent, name))
    model.requires_grad_(False)
    for parent, name in places:
        linear = getattr(parent, name)
        setattr(parent, name, PackedLinear(linear.weight, linear.bias))


def check_packable(linear: nn.Module) -> None:
    """Raises `ValueError` for a layer that is quantized, wrapped by an adapter, or not in memory."""
    kind = type(linear.weight) if type(linear) is nn.Linear else type(linear)
    if kind is not nn.Parameter:
        raise ValueError(
            f"only plain nn.Linear weights can be packed, got {kind}; merge adapters or load without quantization"
        )
    if linear.weight.is_meta:
        raise ValueError("only weights in memory can be packed, got weights on disk or on the meta device")


def linear_layers_of_blocks(blocks: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """The linear layers of transformer blocks, as (parent, name)."""
    places = []
    for block in blocks:
        places += [(block.self_attn, name) for name in ("qkv_proj", "o_proj")]
        places += [(block.mlp, name) for name in ("up_proj", "down_proj")]
    return places


class PackedLinear(nn.Module):
    """
    `nn.Linear` for inference on a CPU, its weight in the layout of oneDNN. A state dict has the plain weight.

    Cannot be moved or cast: raises `ValueError`.
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
                f"packed weights stay on the CPU in {self.packed.dtype}, got {moved.device} and {moved.dtype}; "
                "reload the model"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.packed.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    # Copies and pickles hold the plain weight: tensors in the layout of oneDNN have no storage.
    def __getstate__(self):
        return self.__dict__ | {"packed": self.packed.to_dense()}

    def __setstate__(self, state):
        super().__setstate__(state | {"packed": torch.ops.mkldnn._reorder_linear_weight(state["packed"])})


class PackedBlock(nn.Module):
    """
    A pre-norm transformer block with packed layers, without dropout; names of weights stay. What it attends to is up
    to the model.

    GELU and sums are part of the linear layers. The layers are looked up once and called without hooks: module calls
    and attribute look-ups cost as much as the arithmetic at batch size 1.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.attention_norm, self.self_attn = block.attention_norm, block.self_attn
        self.mlp_norm, self.mlp = block.mlp_norm, block.mlp
        self._head_dim = block.self_attn.head_dim
        self._normalize_attention, self._normalize_mlp = layer_norm(block.attention_norm), layer_norm(block.mlp_norm)
        self._qkv_proj, self._o_proj = block.self_attn.qkv_proj.forward, block.self_attn.o_proj.forward
        self._up_proj, self._down_proj = block.mlp.up_proj.forward, block.mlp.down_proj.forward
        self._fuses_activation = block.self_attn.config.hidden_act == "gelu"

    def _queries_keys_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, T, E)` -> `(3, B, heads, T, dim)`."""
        qkv = self._qkv_proj(self._normalize_attention(hidden_states))
        return qkv.view(*hidden_states.shape[:2], 3, -1, self._head_dim).permute(2, 0, 3, 1, 4)

    def _after_attention(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The rest of the block: `(B, T, E)` and the output of the attention `(B, heads, T, dim)` -> `(B, T, E)`."""
        output = output.transpose(1, 2).reshape(hidden_states.shape)
        hidden_states = self._o_proj(output.to(hidden_states.dtype), add=hidden_states)
        inputs = self._normalize_mlp(hidden_states)
        if self._fuses_activation:
            return self._down_proj(self._up_proj(inputs, activation="gelu"), add=hidden_states)
        return self._down_proj(self.mlp.act_fn(self._up_proj(inputs)), add=hidden_states)


def layer_norm(norm: nn.LayerNorm) -> Callable:
    return partial(
        torch.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )
