"""Faster sampling from the MAR transformer on a CPU: weights packed for oneDNN."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..packing import PackedBlock, PackedLinear, linear_layers_of_blocks, pack_linear_layers
from .masking import rows_at

# The layers of a denoising step act on few rows: in narrower heads, oneDNN takes longer to call than it saves.
LEAST_HEAD_WIDTH = 512


class MARAccelerationMixin:
    """`pack_weights` of [`MARTransformerModel`]. Overrides how [`MARSamplingMixin`] runs its two steps; the sampling
    loop does not change."""

    def pack_weights(self) -> None:
        """
        Lays out the weights for fast sampling on a CPU, in place. Latents stay the same, up to rounding. The model can
        still be saved, but no longer trained, moved, cast or loaded into.

        Raises `ValueError` on another device, in another dtype than float32 and bfloat16, for weights that are
        quantized or offloaded, for adapters that are not merged, and without oneDNN.
        """
        if self.is_packed:
            return
        pack_linear_layers(self, linear_layers(self))
        for stack in (self.encoder, self.decoder):
            stack.layers = nn.ModuleList([PackedMARBlock(block) for block in stack.layers])

    @property
    def is_packed(self) -> bool:
        return isinstance(self.decoder_projection, PackedLinear)

    def _sampling_steps(self) -> tuple[Callable, Callable]:
        steps = super()._sampling_steps()
        if not self.is_packed:
            return steps
        predict, denoise = steps
        return torch.inference_mode()(predict), torch.inference_mode()(denoise)  # without autograd's bookkeeping


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of a MAR transformer that are faster packed, as (parent, name)."""
    head = model.head
    places = [(model, "decoder_projection"), (head, "cond_projection"), (head, "output_modulation")]
    places += [(head.time_embedding, name) for name in ("linear_1", "linear_2")]
    places += [(layer, "modulation") for layer in head.layers]
    if head.config.hidden_size >= LEAST_HEAD_WIDTH:
        places += [(layer, name) for layer in head.layers for name in ("linear_1", "linear_2")]
    return places + linear_layers_of_blocks([*model.encoder.layers, *model.decoder.layers])


class PackedMARBlock(PackedBlock):
    """A `MARBlock` with packed layers."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`MARBlock.forward`]."""
        query, key, value = self._queries_keys_values(hidden_states)
        if queries is not None:
            query, hidden_states = rows_at(query, queries[:, None]), rows_at(hidden_states, queries)
        output = F.scaled_dot_product_attention(query, key, value, attention_mask)
        return self._after_attention(hidden_states, output)
