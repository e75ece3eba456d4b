"""Sampling from the RQ-Transformer: two loops, over the positions and over the depths (section 3.2).

Shapes: `B` images, `H W` code grid, `T = H·W` positions in raster order, `D` quantization depth, `K` codebook size,
`L` length of the condition, `E` hidden size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers import GenerationConfig, GenerationMixin

from .quantizer import embed_codes

PerDepth = float | Sequence[float]


class StaticKeyValueCache:
    """
    Keys and values of one stack, allocated once for `max_length` positions and filled in place.

    `update` returns views of what has been filled. A pass starts either from an empty cache, where causal attention is
    right, or with one new position, which sees everything before it: no mask is ever needed.
    """

    def __init__(self, config, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, batch_size, config.num_attention_heads, max_length, head_dim)
        self.storage = torch.empty(shape, device=device, dtype=dtype)
        self.lengths = [0] * config.num_hidden_layers

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values `(B, heads, t, dim)` of a layer and returns all of its `(B, heads, length, dim)`."""
        start, end = self.lengths[layer_idx], self.lengths[layer_idx] + key.shape[2]
        self.lengths[layer_idx] = end
        keys, values = self.storage[layer_idx]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def reset(self) -> None:
        self.lengths = [0] * len(self.lengths)


class RQGenerationMixin(GenerationMixin):
    """`generate` of the RQ-Transformer; [`GenerationMixin`] only keeps, saves and loads the `generation_config`."""

    @apply_forward_hook
    @torch.no_grad()
    def generate(
        self,
        cond_ids: torch.Tensor | None = None,
        num_images: int | None = None,
        prefix_codes: torch.Tensor | None = None,
        start: int = 0,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
        do_sample: bool | None = None,
        temperature: PerDepth | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: PerDepth | None = None,
        guidance_scale: float | None = None,
        on_position: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        r"""
        Draws code maps, position after position in raster order and at each position coarse to fine.

        Sampling settings that are left out come from `generation_config`, by default the model's own.

        Args:
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): one condition per image.
            num_images (`int`): B of an unconditional model (default 1).
            prefix_codes (`torch.Tensor` of shape `(B, H, W, D)`): codes kept at all positions before `start`.
            start (`int`): raster index of the first position that is drawn, in [0, H·W].
            generator (`torch.Generator`): source of randomness, on the model's device.
            do_sample (`bool`): `False` takes the most likely code each time.
            temperature (`float`, or one per depth): divides the logits; greater than 0.
            top_k (`int`, or one per depth): only the k most likely codes; at least 1. K switches it off.
            top_p (`float`, or one per depth): only the most likely codes whose preceding mass is below p, in (0, 1];
                computed after top-k. 1 switches it off.
            guidance_scale (`float`): classifier-free guidance with scale s: logits = null + s·(conditional − null);
                needs `config.null_cond_id`. 1 switches it off.
            on_position (`Callable`): called with (raster index, codes `(B, H, W, D)`) after every position; the
                codes it returns, if any, are continued from. Positions that are still to be drawn hold 0.

        Returns:
            codes `(B, H, W, D)`, int64.

        Raises:
            `ValueError` or `TypeError` before any work for arguments that contradict each other or are out of range.
        """
        height, width, depth = self.config.code_shape
        num_positions = height * width
        settings = self._resolve_settings(
            generation_config,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        self._check_generator(generator)
        batch_size = self._resolve_batch_size(cond_ids, num_images, prefix_codes)
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size).to(self.device)
        codes = self._prepare_codes(prefix_codes, start, batch_size)  # (B, T, D)
        guided = settings["guidance_scale"] != 1.0
        if guided:
            cond_ids = torch.cat([cond_ids, torch.full_like(cond_ids, self.config.null_cond_id)])

        cache_kwargs = {"batch_size": len(cond_ids), "device": self.device, "dtype": self._activation_dtype()}
        cond_length = self.config.cond_length
        spatial_cache = StaticKeyValueCache(
            self.config.spatial_config, max_length=cond_length + num_positions, **cache_kwargs
        )
        depth_cache = StaticKeyValueCache(self.config.depth_config, max_length=depth, **cache_kwargs)

        def embed(codes):  # once more for the unconditional half
            codewords = embed_codes(codes, self.codebook)
            return torch.cat([codewords, codewords]) if guided else codewords

        def prefix(length):  # inputs for the condition and the first positions, (B, L + length, E)
            return torch.cat([self.embed_condition(cond_ids), self.embed_positions(embed(codes[:, :length]))], dim=1)

        inputs = prefix(start)

        for position in range(start, num_positions):
            context = self.spatial_stack(inputs, spatial_cache)[:, -1]  # (B, E)
            depth_cache.reset()
            for d in range(depth):
                depth_input = self.embed_depth(context, embed(codes[:, position, :d]))  # (B, 1, E)
                hidden_states = self.depth_stack(depth_input, depth_cache)
                logits = self.classifier(hidden_states, first_depth=d)[:, 0].float()  # (B, K)
                if guided:
                    conditional, null = logits.chunk(2)
                    logits = null + settings["guidance_scale"] * (conditional - null)
                codes[:, position, d] = sample_codes(
                    logits,
                    settings["do_sample"],
                    settings["temperature"][d],
                    settings["top_k"][d],
                    settings["top_p"][d],
                    generator,
                )
            inputs = self.embed_positions(embed(codes[:, position : position + 1]), start=position)  # (B, 1, E)
            if on_position is not None:
                codes_map = codes.view(batch_size, height, width, depth)
                replaced = on_position(position, codes_map.clone())
                if replaced is not None and not torch.equal(replaced, codes_map):
                    if len(replaced) != batch_size:
                        raise ValueError(f"on_position must keep the batch size {batch_size}, got {len(replaced)}")
                    codes = self._prepare_codes(replaced, position + 1, batch_size)
                    spatial_cache.reset()
                    inputs = prefix(position + 1)
        return codes.view(batch_size, height, width, depth)

    def _resolve_settings(self, generation_config: GenerationConfig | None, **given) -> dict:
        """Fills what was not given from the generation config, and checks it; lists have one value per depth."""
        defaults = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0, "guidance_scale": 1.0}
        config = self.generation_config if generation_config is None else generation_config
        settings = {}
        for name, default in defaults.items():
            value = getattr(config, name, None) if given[name] is None else given[name]
            settings[name] = default if value is None else value

        depth, codebook_size = self.config.code_shape[-1], self.config.codebook_size
        for name in ("temperature", "top_k", "top_p"):
            value = settings[name]
            values = list(value) if isinstance(value, Sequence) else [value] * depth
            if len(values) != depth:
                raise ValueError(f"{name} must be a number or one per depth ({depth}), got {len(values)} values")
            settings[name] = values
        if not all(t > 0 and math.isfinite(t) for t in settings["temperature"]):
            raise ValueError(
                f"temperature must be greater than 0, got {settings['temperature']}; do_sample=False is greedy"
            )
        if not all(k is None or (k >= 1 and k == int(k)) for k in settings["top_k"]):
            raise ValueError(f"top_k must be an integer of at least 1, got {settings['top_k']}")
        settings["top_k"] = [codebook_size if k is None else min(int(k), codebook_size) for k in settings["top_k"]]
        if not all(0 < p <= 1 for p in settings["top_p"]):
            raise ValueError(f"top_p must lie in (0, 1], got {settings['top_p']}")
        if not math.isfinite(settings["guidance_scale"]):
            raise ValueError(f"guidance_scale must be finite, got {settings['guidance_scale']}")
        if settings["guidance_scale"] != 1.0 and self.config.null_cond_id is None:
            raise ValueError(
                f"guidance_scale={settings['guidance_scale']} needs a model with a null condition, "
                "but config.null_cond_id is None"
            )
        return settings

    def _check_generator(self, generator) -> None:
        if generator is None:
            return
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be one torch.Generator, got {type(generator).__name__}")
        if generator.device.type != self.device.type:
            raise ValueError(f"the generator is on {generator.device}, the model on {self.device}")

    def _resolve_batch_size(self, cond_ids, num_images, prefix_codes) -> int:
        sizes = {
            "cond_ids": None if cond_ids is None else len(cond_ids),
            "num_images": num_images,
            "prefix_codes": None if prefix_codes is None else len(prefix_codes),
        }
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"arguments of different batch size: {sizes}")
        batch_size = next(iter(sizes.values()), 1)
        if batch_size < 1:
            raise ValueError(f"at least 1 image needed, got {sizes}")
        return batch_size

    def _prepare_codes(self, prefix_codes, start, batch_size) -> torch.Tensor:
        """`(B, T, D)`, zero except for the kept positions."""
        height, width, depth = self.config.code_shape
        if not 0 <= start <= height * width:
            raise ValueError(f"start must lie in [0, {height * width}], the positions in raster order, got {start}")
        if (prefix_codes is None) != (start == 0):
            raise ValueError(
                "prefix_codes and start > 0 belong together, got "
                f"{'no prefix_codes' if prefix_codes is None else 'prefix_codes'} and start={start}"
            )
        codes = torch.zeros(batch_size, height * width, depth, dtype=torch.long, device=self.device)
        if prefix_codes is not None:
            self.check_codes(prefix_codes)
            codes[:, :start] = prefix_codes.flatten(1, 2)[:, :start].to(self.device)
        return codes

    def _activation_dtype(self) -> torch.dtype:
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets all but the top-k, and of these all but the top-p nucleus, to −inf. Logits `(B, K)` float32 -> `(B, K)`.

    Codes equal to the k-th largest logit are all kept. A code is kept while the mass *before* it, under the softmax of
    what top-k kept, is below p; the most likely one always is.
    """
    if top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        outside = (mass_before >= top_p) & (mass_before > 0)
        outside = torch.zeros_like(outside).scatter_(-1, order, outside)
        logits = logits.masked_fill(outside, -math.inf)
    return logits


def sample_codes(
    logits: torch.Tensor,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """One code per row of logits `(B, K)` float32: the most likely, or drawn after temperature, top-k, top-p."""
    if not do_sample:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1)
    return probabilities.multinomial(1, generator=generator).squeeze(-1)
