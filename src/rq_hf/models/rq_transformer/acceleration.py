"""Faster sampling from the RQ-Transformer: weights packed for oneDNN on a CPU, compiled steps on accelerators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..offloading import check_not_group_offloaded
from ..packing import PackedBlock, PackedLinear, linear_layers_of_blocks, pack_linear_layers
from .classifier import RQClassifier
from .key_value_cache import MaskedKeyValueCache, StaticKeyValueCache


class RQAccelerationMixin:
    """
    `pack_weights` and `compile_steps` of the RQ-Transformer. Overrides how [`RQGenerationMixin`] runs its two steps
    and where its spatial cache comes from; the sampling loop does not change.
    """

    _compile_options = None
    _kept_caches = None  # static caches kept between calls of compiled sampling, by (rows, positions, device, dtype)

    def pack_weights(self) -> None:
        """
        Lays out the weights for fast sampling on a CPU, in place. Codes stay the same, up to rounding in bfloat16.
        The model can still be saved, but no longer trained, moved, cast or loaded into.

        Raises `ValueError` on another device, in another dtype than float32 and bfloat16, for weights that are
        quantized or offloaded, for adapters that are not merged, without oneDNN, and after [`compile_steps`].
        """
        if self.is_packed:
            return
        if self._compile_options is not None:
            raise ValueError("cannot pack a model after compile_steps; reload it")
        pack_linear_layers(self, linear_layers(self))
        for stack in (self.spatial_stack, self.depth_stack):
            stack.layers = nn.ModuleList([PackedRQBlock(block) for block in stack.layers])
        self.classifier = PackedClassifier(self.classifier)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.classifier, PackedClassifier)

    def compile_steps(self, **options) -> None:
        """
        Compiles the two sampling steps with static shapes, for accelerators: [`~torch.compile`] makes each of them one
        graph without synchronisation, by default a CUDA graph (`mode="reduce-overhead"`). The first call with another
        number of images, top-k, top-p or `keep_depth`, or with guidance for the first time, takes minutes. Codes stay
        the same, up to rounding in low precision. The model can be trained, moved and saved as before.

        Between calls, the key-value cache of every batch size is kept in memory.

        Raises `ValueError` for an attention implementation that takes no mask, such as flash attention, for packed
        weights, and for a model that is offloaded or spread over several devices.
        """
        if self.is_packed:
            raise ValueError("cannot compile a packed model; reload it")
        check_not_group_offloaded(self)
        devices = set(getattr(self, "hf_device_map", {}).values())
        if len(devices) > 1:
            raise ValueError(f"cannot compile a model that is spread over {sorted(map(str, devices))}")
        attention = self.config.spatial_config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f'compile_steps requires attn_implementation "sdpa" or "eager", got {attention!r}')
        self._compile_options = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False} | options
        self._kept_caches = {}

    def _sampling_steps(self) -> tuple[Callable, Callable]:
        spatial_step, depth_loop = super()._sampling_steps()
        if self.is_packed:  # autograd bookkeeping costs 10 % at batch size 1
            return torch.inference_mode()(spatial_step), torch.inference_mode()(depth_loop)
        if self._compile_options is None:
            return spatial_step, depth_loop
        compiled_spatial_step = torch.compile(self._masked_spatial_step, **self._compile_options)
        compiled_depth_loop = torch.compile(depth_loop, **self._compile_options)
        # CUDA graphs reuse their output memory, so the outputs are cloned.
        return (
            lambda codes, index, cache: compiled_spatial_step(codes, index, cache.layers).clone(),
            lambda *args: [output.clone() for output in compiled_depth_loop(*args)],
        )

    def _masked_spatial_step(self, codes, index, layers) -> torch.Tensor:
        """The spatial step with static shapes: `layers` are those of the cache."""
        return self._spatial_step(codes, index, MaskedKeyValueCache(layers, self.config.cond_length + index))

    @contextmanager
    def _spatial_cache(self, num_rows: int) -> Iterator[StaticKeyValueCache]:
        """A new cache, or for compiled steps the one of an earlier call, because their graphs are bound to its
        address."""
        if self._compile_options is None:
            with super()._spatial_cache(num_rows) as cache:
                yield cache
            return
        place = self.device, self._cache_dtype()
        shape = (num_rows, self.config.cond_length + self.num_positions, *place)
        self._kept_caches = {other: cache for other, cache in self._kept_caches.items() if other[2:] == place}
        with torch.inference_mode(False), torch.no_grad():
            cache = self._kept_caches.pop(shape, None) or StaticKeyValueCache(self.config.spatial_config, *shape)
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.zero_())
        try:
            # Every batch size, top-k and top-p has a graph of its own: more than dynamo's default limit of 8.
            with torch._dynamo.config.patch(recompile_limit=256):
                yield cache
        finally:
            self._kept_caches[shape] = cache


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of an RQ-Transformer, as (parent, name)."""
    names = ("code_projection", "depth_projection", "cond_classifier")
    blocks = (*model.spatial_stack.layers, *model.depth_stack.layers)
    return [(model, name) for name in names if hasattr(model, name)] + linear_layers_of_blocks(blocks)


class PackedRQBlock(PackedBlock):
    """An `RQBlock` with packed layers."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self._layer_idx = block.self_attn.layer_idx

    def forward(self, hidden_states: torch.Tensor, past_key_values=None) -> torch.Tensor:
        qkv = self._queries_keys_values(hidden_states)
        query, keys_values = qkv[0], qkv[1:]
        if past_key_values is not None:
            keys_values = past_key_values.update(keys_values, self._layer_idx)
        key, value = keys_values
        is_causal = query.shape[2] > 1
        output = F.scaled_dot_product_attention(query.to(key.dtype), key, value, is_causal=is_causal)
        return self._after_attention(hidden_states, output)


class PackedClassifier(RQClassifier):
    """An [`RQClassifier`] with packed maps, for sampling only; names of weights stay."""

    def __init__(self, classifier: RQClassifier):
        nn.Module.__init__(self)
        self.norm, self.bias = classifier.norm, classifier.bias
        self._maps = [PackedLinear(weight, bias) for weight, bias in zip(classifier.weight, classifier.bias)]

    def logits(self, hidden_states: torch.Tensor, m: int) -> torch.Tensor:
        return self._maps[m](hidden_states)

    def cross_entropy(self, *args, **kwargs):
        raise ValueError("a packed model cannot compute a loss; reload it to train")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.stack([linear.packed.to_dense() for linear in self._maps])
