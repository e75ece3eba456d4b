"""Sampling from the RQ-Transformer: two loops, over the positions and over the depths (section 3.2).

Shapes: `B` images, `H W` code grid, `T = H·W` positions in raster order, `D` quantization depth, `K` codebook size,
`L` length of the condition, `E` hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from transformers import GenerationConfig, GenerationMixin

from ..codes import embed_codes
from .code_sampling import CodeSampler, Generators, check_generator, draw_uniform

PerDepth = float | Sequence[float]

# Share of the guidance at the progress in [0, 1] over the positions.
GUIDANCE_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


class StaticKeyValueCache:
    """
    Keys and values of one stack, allocated once for `max_length` positions and filled in place.

    `update` returns views of what has been filled. A pass starts either from an empty cache, where causal attention is
    right, or with one new position, which sees everything before it: no mask is ever needed. It may be filled for the
    first rows of the batch only, which `expand` then copies to all.
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
        """Row i becomes what row `rows[i]` is."""
        for layer, length in zip(self.layers, self.lengths):
            layer[..., :length, :] = layer[:, rows, :, :length]

    def reset(self) -> None:
        self.lengths = [0] * len(self.lengths)


class MaskedKeyValueCache:
    """
    What fills the layers of a [`StaticKeyValueCache`] in one compiled step: keys and values are those of all positions
    each time, with a mask instead of a length, so that all steps have the same shapes.

    Args:
        layers: of the cache, `(2, B, heads, max_length, dim)` each.
        index: of the position that is new, a tensor of shape `(1,)`; what comes after it is masked.
    """

    def __init__(self, layers: Sequence[torch.Tensor], index: torch.Tensor):
        self.layers = layers
        self.index = index
        self.mask = (torch.arange(layers[0].shape[3], device=index.device) <= index)[None, None, None]  # (1, 1, 1, T)

    def update(self, keys_values: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Stores keys and values `(2, B, heads, 1, dim)`; returns those of all positions."""
        layer = self.layers[layer_idx]
        return layer.index_copy_(3, self.index, keys_values.to(layer.dtype))


class RQGenerationMixin(GenerationMixin):
    """`generate` of the RQ-Transformer; [`GenerationMixin`] only keeps, saves and loads the `generation_config`."""

    _compile_options = None

    @apply_forward_hook
    @torch.no_grad()
    def generate(
        self,
        cond_ids: torch.Tensor | None = None,
        num_images: int | None = None,
        prefix_codes: torch.Tensor | None = None,
        start: int = 0,
        generation_config: GenerationConfig | None = None,
        generator: Generators = None,
        do_sample: bool | None = None,
        temperature: PerDepth | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: PerDepth | None = None,
        guidance_scale: PerDepth | None = None,
        guidance_schedule: str = "constant",
        negative_cond_ids: torch.Tensor | None = None,
        keep_depth: int = 0,
        on_position: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        r"""
        Draws code maps, position after position in raster order and at each position coarse to fine.

        Sampling settings that are left out come from `generation_config`, by default the model's own.

        Args:
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): one condition per image.
            num_images (`int`): B of an unconditional model (default 1).
            prefix_codes (`torch.Tensor` of shape `(B, H, W, D)`): codes of given images. Kept are all at the positions
                before `start`, and the first `keep_depth` of every position.
            start (`int`): raster index of the first position that is drawn, in [0, H·W].
            keep_depth (`int`): at every position only the codes after the first so many are drawn, in [0, D):
                variations of an image.
            generator (`torch.Generator`, or a list of them or of seeds): source of randomness of the batch; or one per
                image, whose codes then do not depend on what else is in the batch (up to rounding of the logits).
            do_sample (`bool`): `False` takes the most likely code each time.
            temperature (`float`, or one per depth): divides the logits; greater than 0.
            top_k (`int`, or one per depth): only the k most likely codes; at least 1. K switches it off.
            top_p (`float`, or one per depth): only the most likely codes whose preceding mass is below p, in (0, 1];
                computed after top-k. 1 switches it off.
            guidance_scale (`float`, or one per depth): classifier-free guidance with scale s: logits = null +
                s·(conditional − null); needs `config.null_cond_id` or `negative_cond_ids`. 1 switches it off.
            guidance_schedule (`str`): s − 1 over the positions: `"constant"`, or growing from 0 to its value,
                `"linear"` or like half a `"cosine"`.
            negative_cond_ids (`torch.Tensor` of shape `(B, L)`, int64): what guidance leads away from, instead of
                the null condition.
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
        guidance_scale = settings.pop("guidance_scale")
        guided = any(scale != 1.0 for scale in guidance_scale)
        self._check_guidance(guided, guidance_scale, guidance_schedule, negative_cond_ids)
        batch_size = self._resolve_batch_size(cond_ids, num_images, prefix_codes)
        check_generator(generator, batch_size)
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size).to(self.device)
        codes = self._prepare_codes(prefix_codes, start, keep_depth, batch_size)  # (B, T, D)
        if guided:
            cond_ids = torch.cat([cond_ids, self._negative(negative_cond_ids, cond_ids)])
        scales = self._guidance_over_positions(guidance_scale, guidance_schedule) if guided else [None] * num_positions
        settings["temperature"] = torch.tensor(settings["temperature"], device=self.device, dtype=torch.float32)
        sampler = CodeSampler(**settings)
        uniform = [None] * num_positions
        if sampler.do_sample:
            shape = (batch_size, num_positions - start, depth, sampler.num_candidates)
            uniform = draw_uniform(generator, shape, self.device).transpose(0, 1).contiguous()

        next_context, draw_position = self._steps()
        indices = torch.arange(num_positions, device=self.device)
        largest_logits = torch.zeros(batch_size, device=self.device)  # summed up
        reads_prefix = True  # otherwise the position drawn last is all that is new
        with self._spatial_cache(len(cond_ids)) as cache:
            for position in range(start, num_positions):
                if reads_prefix:
                    context = self._read_prefix(cond_ids, codes[:, :position], cache)
                else:
                    context = next_context(codes[:, position - 1], indices[position - 1 : position], cache)
                kept, numbers = codes[:, position, :keep_depth], uniform[position - start]
                codes[:, position], largest = draw_position(context, kept, numbers, scales[position], sampler)
                largest_logits += largest
                replaced = None if on_position is None else self._replaced(on_position, position, codes, keep_depth)
                reads_prefix = replaced is not None
                if reads_prefix:
                    codes = replaced
        if not largest_logits.isfinite().all():  # asked once, for a device would be waited for
            raise ValueError("the model gave logits that are NaN or infinite; in float16, try bfloat16 or float32")
        return codes.view(batch_size, height, width, depth)

    def compile_steps(self, **options) -> None:
        """
        Compiles the two steps of sampling with fixed shapes, for a device: [`~torch.compile`] makes each of them one
        graph that nothing has to wait for, by default a CUDA graph (`mode="reduce-overhead"`). The first call with
        another number of images, top-k, top-p, `keep_depth`, or with guidance for the first time takes minutes. Codes
        stay the same, up to rounding in low precision; the model can be trained, moved and saved as ever.

        Between calls the memory of keys and values is kept, for every number of images that was drawn.

        Raises `ValueError` for an attention that takes no mask, such as flash attention, for packed weights, and for
        a model that is spread over several devices.
        """
        if self.is_packed:
            raise ValueError("packed weights are not compiled: load the model anew")
        places = set(getattr(self, "hf_device_map", {}).values())
        if len(places) > 1:
            raise ValueError(f"a model that is spread over {sorted(map(str, places))} is not compiled")
        attention = self.config.spatial_config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"compiled steps need the attention 'sdpa' or 'eager', got {attention!r}")
        defaults = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        self._compile_options = defaults | options

    def _steps(self) -> tuple[Callable, Callable]:
        """[`_next_context`] and [`_draw_position`], as they are run."""
        steps = self._next_context, self._draw_position
        if self.is_packed:  # for one image, what autograd notes down takes a tenth of the time
            return tuple(torch.inference_mode()(step) for step in steps)
        if self._compile_options is None:
            return steps
        next_context = torch.compile(self._next_context_of_fixed_shape, **self._compile_options)
        draw_position = torch.compile(self._draw_position, **self._compile_options)
        # The next replay of a graph overwrites what this one returned.
        return (
            lambda codes, index, cache: next_context(codes, index, cache.layers).clone(),
            lambda *args: [out.clone() for out in draw_position(*args)],
        )

    @contextmanager
    def _spatial_cache(self, num_rows: int) -> Iterator[StaticKeyValueCache]:
        """An empty one; for compiled steps, whose graphs hold its address, that of an earlier call."""
        height, width, _ = self.config.code_shape
        place = self.device, self._cache_dtype()
        shape = (num_rows, self.config.cond_length + height * width, *place)
        if self._compile_options is None:
            yield StaticKeyValueCache(self.config.spatial_config, *shape)
            return
        self._kept_caches = {other: cache for other, cache in self._kept_caches.items() if other[2:] == place}
        with torch.inference_mode(False), torch.no_grad():
            cache = self._kept_caches.pop(shape, None) or StaticKeyValueCache(self.config.spatial_config, *shape)
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.zero_())
        try:
            # One graph for every batch size, top-k and top-p that was used: more than dynamo's default of 8.
            with torch._dynamo.config.patch(recompile_limit=256):
                yield cache
        finally:
            self._kept_caches[shape] = cache

    def _replaced(self, on_position, position, codes, keep_depth) -> torch.Tensor | None:
        """What to go on from after this position if the callback returns other codes than these `(B, T, D)`."""
        codes_map = codes.unflatten(1, self.config.code_shape[:2])
        replaced = on_position(position, codes_map.clone())
        if replaced is None or torch.equal(replaced, codes_map):
            return None
        if len(replaced) != len(codes):
            raise ValueError(f"on_position must keep the batch size {len(codes)}, got {len(replaced)}")
        return self._prepare_codes(replaced, position + 1, keep_depth, len(codes))

    def _read_prefix(self, cond_ids, codes, cache) -> torch.Tensor:
        """Context `(B, E)` of the position after the condition `(B, L)` and the positions `(B, t, D)`."""
        cache.reset()
        if codes.shape[1] == 0:  # images of one condition share it
            distinct, rows = cond_ids.unique(dim=0, return_inverse=True)
            contexts = self.spatial_stack(self.embed_condition(distinct), cache)
            cache.expand(rows)
            return contexts[:, -1][rows]
        codes = codes.repeat(len(cond_ids) // len(codes), 1, 1)  # once more for the unconditional half
        positions = self.embed_positions(embed_codes(codes, self.codebook))
        inputs = torch.cat([self.embed_condition(cond_ids), positions], dim=1)  # (B, L + t, E)
        return self.spatial_stack(inputs, cache)[:, -1].contiguous()

    def _next_context(self, codes, index, cache) -> torch.Tensor:
        """Context `(B, E)` of the position after the one with this index `(1,)`, whose codes `(B, D)` are new."""
        codes = codes.repeat(cache.layers[0].shape[1] // len(codes), 1)  # once more for the unconditional half
        codewords = embed_codes(codes[:, None], self.codebook)
        return self.spatial_stack(self.embed_positions(codewords, index), cache)[:, -1]

    def _next_context_of_fixed_shape(self, codes, index, layers) -> torch.Tensor:
        return self._next_context(codes, index, MaskedKeyValueCache(layers, self.config.cond_length + index))

    def _draw_position(self, context, kept, uniform, scales, sampler) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws the codes of one position, coarse to fine.

        Args:
            context: `(B, E)`, or `(2·B, E)` with guidance.
            kept: codes `(B, d)` that are given.
            uniform: numbers in [0, 1), `(B, D, R)`; or `None`, when codes are not drawn at random.
            scales: of guidance, `(D,)`; or `None`.

        Returns:
            codes `(B, D)` and the sum of their largest logits `(B,)`.
        """
        depth = self.config.code_shape[-1]
        cache = StaticKeyValueCache(self.config.depth_config, len(context), depth, context.device, self._cache_dtype())
        codes, largest = kept, 0
        for d in range(kept.shape[-1], depth):
            codewords = embed_codes(codes.repeat(len(context) // len(codes), 1), self.codebook)  # (B, d, C)
            if d == kept.shape[-1]:
                inputs = self.embed_depths(context, codewords)  # (B, 1 + d, E)
            else:
                inputs = self.embed_depth(context, codewords)  # (B, 1, E)
            hidden_states = self.depth_stack(inputs, cache)[:, -1:]
            scale = None if scales is None else scales[d]
            logits = self.classifier(hidden_states, first_depth=d, guidance_scale=scale)[:, 0].float()  # (B, K)
            largest = largest + logits.amax(dim=-1)
            codes = torch.cat([codes, sampler.draw(logits, uniform, d)[:, None]], dim=-1)
        return codes, largest

    def _resolve_settings(self, generation_config: GenerationConfig | None, **given) -> dict:
        """Fills what was not given from the generation config, and checks it; lists have one value per depth."""
        defaults = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0, "guidance_scale": 1.0}
        config = self.generation_config if generation_config is None else generation_config
        settings = {}
        for name, default in defaults.items():
            value = getattr(config, name, None) if given[name] is None else given[name]
            settings[name] = default if value is None else value

        depth, codebook_size = self.config.code_shape[-1], self.config.codebook_size
        for name in ("temperature", "top_k", "top_p", "guidance_scale"):
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
        settings["top_p"] = [float(p) for p in settings["top_p"]]
        if not all(math.isfinite(scale) for scale in settings["guidance_scale"]):
            raise ValueError(f"guidance_scale must be finite, got {settings['guidance_scale']}")
        return settings

    def _check_guidance(self, guided, scales, schedule, negative_cond_ids) -> None:
        if schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {list(GUIDANCE_SCHEDULES)}, got {schedule!r}")
        if not guided and (negative_cond_ids is not None or schedule != "constant"):
            name = "negative_cond_ids" if negative_cond_ids is not None else "guidance_schedule"
            raise ValueError(f"{name} needs a guidance_scale other than 1")
        if guided and negative_cond_ids is None and self.config.null_cond_id is None:
            raise ValueError(
                f"guidance_scale={scales} needs a model with a null condition, but config.null_cond_id is None; "
                "or give negative_cond_ids"
            )

    def _guidance_over_positions(self, scales, schedule) -> torch.Tensor:
        """Scales of guidance `(T, D)`."""
        height, width, _ = self.config.code_shape
        last = max(1, height * width - 1)
        progress = torch.tensor([GUIDANCE_SCHEDULES[schedule](position / last) for position in range(height * width)])
        return (1 + (torch.tensor(scales) - 1) * progress[:, None]).to(self.device)

    def _negative(self, negative_cond_ids, cond_ids) -> torch.Tensor:
        """What guidance leads away from, `(B, L)`."""
        if negative_cond_ids is None:
            return torch.full_like(cond_ids, self.config.null_cond_id)
        return self.prepare_cond_ids(negative_cond_ids, len(cond_ids)).to(self.device)

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

    def _prepare_codes(self, prefix_codes, start, keep_depth, batch_size) -> torch.Tensor:
        """`(B, T, D)`, zero except for what is kept."""
        height, width, depth = self.config.code_shape
        if not 0 <= start <= height * width:
            raise ValueError(f"start must lie in [0, {height * width}], the positions in raster order, got {start}")
        if not 0 <= keep_depth < depth:
            raise ValueError(f"keep_depth must lie in [0, {depth}), got {keep_depth}")
        if (prefix_codes is None) != (start == keep_depth == 0):
            raise ValueError(
                "prefix_codes go with start > 0 or keep_depth > 0, got "
                f"{'no prefix_codes' if prefix_codes is None else 'prefix_codes'}, {start=}, {keep_depth=}"
            )
        codes = torch.zeros(batch_size, height * width, depth, dtype=torch.long, device=self.device)
        if prefix_codes is not None:
            self.check_codes(prefix_codes)
            given = prefix_codes.flatten(1, 2).to(self.device)
            codes[:, :start] = given[:, :start]
            codes[:, start:, :keep_depth] = given[:, start:, :keep_depth]
        return codes

    def _cache_dtype(self) -> torch.dtype:
        device = self.device.type
        if device == "cpu":  # where attention in bfloat16 takes several times as long
            return torch.float32
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
