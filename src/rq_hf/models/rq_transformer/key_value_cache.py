"""Key-value caches of the two stacks."""

from collections.abc import Sequence

import torch


class StaticKeyValueCache:
    """
    Keys and values of one stack, allocated once for `max_length` positions and filled in place.

    `update` returns views of the filled part. A pass starts either from an empty cache, where causal attention is
    right, or with one new position, which sees everything before it: no mask is ever needed. It may be filled for the
    first rows of the batch only, which `expand` then copies to all.

    [`~transformers.StaticCache`] always attends to all `max_length` positions under a mask, and keeps its length in a
    tensor, so that reading it synchronises with the device.
    """

    mask = None

    def __init__(self, config, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype):
        num_heads = config.num_attention_heads
        shape = (2, batch_size, num_heads, max_length, config.hidden_size // num_heads)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * config.num_hidden_layers

    def update(self, keys_values: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Appends keys and values `(2, B, heads, t, dim)` of a layer; returns all of them, `(2, B, heads, T, dim)`."""
        start, end = self.lengths[layer_idx], self.lengths[layer_idx] + keys_values.shape[3]
        self.lengths[layer_idx] = end
        filled = self.layers[layer_idx].narrow(3, 0, end).narrow(1, 0, keys_values.shape[1])
        filled.narrow(3, start, end - start).copy_(keys_values)
        return filled

    def expand(self, rows: torch.Tensor) -> None:
        """Copies row `rows[i]` to row i."""
        for layer, length in zip(self.layers, self.lengths):
            layer[..., :length, :] = layer[:, rows, :, :length]

    def reset(self) -> None:
        self.lengths = [0] * len(self.lengths)


class MaskedKeyValueCache:
    """
    View of a [`StaticKeyValueCache`] for compiled steps: `update` returns the keys and values of all positions, with a
    mask instead of a length, so that all steps have the same shapes.

    Args:
        layers: those of the cache, `(2, B, heads, max_length, dim)` each.
        index: index of the new position, a tensor of shape `(1,)`; later positions are masked.
    """

    def __init__(self, layers: Sequence[torch.Tensor], index: torch.Tensor):
        self.layers = layers
        self.index = index
        self.mask = (torch.arange(layers[0].shape[3], device=index.device) <= index)[None, None, None]  # (1, 1, 1, T)

    def update(self, keys_values: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Stores keys and values `(2, B, heads, 1, dim)`; returns those of all positions."""
        layer = self.layers[layer_idx]
        return layer.index_copy_(3, self.index, keys_values.to(layer.dtype))
