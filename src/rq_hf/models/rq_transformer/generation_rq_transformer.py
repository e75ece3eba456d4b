"""Sampling from the RQ-Transformer: two loops, over the positions and over the depths (section 3.2).

Shapes: `B` images, `H W` code grid, `T = H·W` positions in raster order, `D` quantization depth, `K` codebook size,
`L` length of the condition, `E` hidden size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, GenerationMixin

from ...argument_checks import check_callable, check_shape
from ..codes import embed_codes
from ..offloading import onload_weights
from ..random_numbers import Generators, check_generator, uniform_numbers
from .code_sampling import CodeSampler
from .generation_settings import (
    GenerationSettings,
    PerDepth,
    check_generation_config_file,
    check_prefix,
    resolve_batch_size,
)
from .key_value_cache import StaticKeyValueCache


class RQGenerationMixin(GenerationMixin):
    """
    `generate` of [`RQTransformerModel`], from whose embeddings, stacks and classifier it samples.

    [`GenerationMixin`] is inherited only for its handling of `generation_config`.
    """

    def adjust_generation_fn(self, *args, **kwargs):
        # transformers treats a generation_config.json that it cannot parse like one that is missing.
        given = inspect.signature(super().adjust_generation_fn).bind(*args, **kwargs).arguments
        if given["generation_config"] is None and given["pretrained_model_name_or_path"] is not None:
            hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
            check_generation_config_file(
                given["pretrained_model_name_or_path"], **{name: given[name] for name in hub if name in given}
            )
        super().adjust_generation_fn(*args, **kwargs)

    @onload_weights
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
        Samples code maps, position after position in raster order and at each position coarse to fine.

        Sampling settings that are left out come from `generation_config`, by default the model's own. Settings of it
        that this method does not have, such as beams or a length, are refused.

        Args:
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): one condition per image.
            num_images (`int`): B of an unconditional model (default 1).
            prefix_codes (`torch.Tensor` of shape `(B, H, W, D)`): codes of given images. Those at the positions before
                `start` are kept, and the first `keep_depth` of every position.
            start (`int`): raster index of the first position to sample, in [0, H·W].
            keep_depth (`int`): keep the first `keep_depth` codes of every position and sample the rest, in [0, D):
                variations of an image.
            generator (`torch.Generator`, or a list of them or of seeds in [0, 2³²)): source of randomness of the
                batch; or one per image, whose codes then do not depend on the rest of the batch (up to rounding of
                the logits).
            do_sample (`bool`): `False` takes the most likely code each time.
            temperature (`float`, or one per depth): divides the logits; greater than 0.
            top_k (`int`, or one per depth): only the k most likely codes; at least 1. K disables it.
            top_p (`float`, or one per depth): only the most likely codes whose preceding mass is below p, in (0, 1];
                computed after top-k. 1 disables it.
            guidance_scale (`float`, or one per depth): classifier-free guidance with scale s: logits = null +
                s·(conditional − null); needs `config.null_cond_id` or `negative_cond_ids`. 1 disables it.
            guidance_schedule (`str`): s − 1 over the positions: `"constant"`, or growing from 0 to its value,
                `"linear"` or as half a `"cosine"`.
            negative_cond_ids (`torch.Tensor` of shape `(B, L)`, int64): the condition that guidance steers away from,
                instead of the null condition.
            on_position (`Callable`): called with (raster index, codes `(B, H, W, D)`) after every position; sampling
                continues from the codes it returns, if any. Positions that are still to be sampled hold 0.

        Returns:
            codes `(B, H, W, D)`, int64.

        Raises:
            `ValueError` or `TypeError` before any work for arguments that contradict each other or are out of range.
        """
        height, width, depth = self.config.code_shape
        settings = GenerationSettings.resolve(
            self.generation_config if generation_config is None else generation_config,
            depth,
            self.config.codebook_size,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        settings.check_guidance(guidance_schedule, negative_cond_ids, self.config.null_cond_id)
        batch_size = resolve_batch_size(cond_ids, num_images, prefix_codes)
        check_callable("on_position", on_position)
        check_generator(generator, batch_size)
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size).to(self.device)
        codes = self._prepare_codes(prefix_codes, start, keep_depth, batch_size)  # (B, T, D)

        scales = [None] * self.num_positions
        if settings.is_guided:
            cond_ids = torch.cat([cond_ids, self.prepare_negative_cond_ids(negative_cond_ids, cond_ids)])
            scales = settings.guidance_over_positions(self.num_positions, guidance_schedule, self.device)
        sampler = settings.code_sampler(self.device)
        uniform = [None] * self.num_positions
        if settings.do_sample:
            shape = (batch_size, self.num_positions - start, depth, sampler.num_proposals)
            uniform = uniform_numbers(generator, shape, self.device).transpose(0, 1).contiguous()

        spatial_step, depth_loop = self._sampling_steps()
        indices = torch.arange(self.num_positions, device=self.device)
        largest_logits = torch.zeros(batch_size, device=self.device)  # running sum; one check for NaN at the end
        needs_prefill = True  # afterwards, only the last position has to be fed, unless the callback changes codes
        with self._spatial_cache(len(cond_ids)) as past_key_values:
            for position in range(start, self.num_positions):
                if needs_prefill:
                    context = self._prefill(cond_ids, codes[:, :position], past_key_values)
                else:
                    last = position - 1
                    context = spatial_step(codes[:, last], indices[last:position], past_key_values)
                prefix, numbers = codes[:, position, :keep_depth], uniform[position - start]
                codes[:, position], largest = depth_loop(context, prefix, numbers, scales[position], sampler)
                largest_logits += largest
                needs_prefill = False
                if on_position is not None:
                    codes, needs_prefill = self._apply_callback(on_position, position, codes, keep_depth)
        if not largest_logits.isfinite().all():  # checked once: each check synchronises with the device
            raise ValueError(
                "the model gave logits that are NaN or infinite; in float16, try bfloat16 or float32, and where "
                "guidance_scale is large, a smaller one"
            )
        return codes.view(batch_size, height, width, depth)

    def _sampling_steps(self) -> tuple[Callable, Callable]:
        """[`_spatial_step`] and [`_depth_loop`], as they are run."""
        return self._spatial_step, self._depth_loop

    @contextmanager
    def _spatial_cache(self, num_rows: int) -> Iterator[StaticKeyValueCache]:
        """A cache of the spatial stack for this many rows."""
        max_length = self.config.cond_length + self.num_positions
        yield StaticKeyValueCache(self.config.spatial_config, num_rows, max_length, self.device, self._cache_dtype())

    def _prefill(self, cond_ids, codes, past_key_values) -> torch.Tensor:
        """Context `(B, E)` of the position after the condition `(B, L)` and the positions `(B, t, D)`."""
        past_key_values.reset()
        if codes.shape[1] == 0:  # images of one condition share it
            distinct, rows = cond_ids.unique(dim=0, return_inverse=True)
            contexts = self.spatial_stack(self.embed_condition(distinct), past_key_values)
            past_key_values.expand(rows)
            return contexts[:, -1][rows]
        codes = codes.repeat(len(cond_ids) // len(codes), 1, 1)  # once more for the null half
        positions = self.embed_positions(embed_codes(codes, self.codebook))
        inputs = torch.cat([self.embed_condition(cond_ids), positions], dim=1)  # (B, L + t, E)
        return self.spatial_stack(inputs, past_key_values)[:, -1].contiguous()

    def _spatial_step(self, codes, index, past_key_values) -> torch.Tensor:
        """Context `(B, E)` of the position after the one with this index `(1,)`, whose codes `(B, D)` are new."""
        codes = codes.repeat(past_key_values.layers[0].shape[1] // len(codes), 1)  # once more for the null half
        codewords = embed_codes(codes[:, None], self.codebook)
        return self.spatial_stack(self.embed_positions(codewords, index), past_key_values)[:, -1]

    def _depth_loop(
        self,
        context: torch.Tensor,
        prefix: torch.Tensor,
        uniform: torch.Tensor | None,
        scales: torch.Tensor | None,
        sampler: CodeSampler,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Samples the codes of one position, coarse to fine.

        Args:
            context: `(B, E)`, or `(2·B, E)` with guidance.
            prefix: given codes `(B, d)`.
            uniform: numbers in [0, 1), `(B, D, R)`; `None` when greedy.
            scales: guidance scales `(D,)`; `None` without guidance.

        Returns:
            codes `(B, D)` and the sum of their largest logits `(B,)`.
        """
        depth, given = self.config.code_shape[-1], prefix.shape[-1]
        device, dtype = context.device, self._cache_dtype()
        past_key_values = StaticKeyValueCache(self.config.depth_config, len(context), depth, device, dtype)
        codes, largest = prefix, 0
        for d in range(given, depth):
            codewords = embed_codes(codes.repeat(len(context) // len(codes), 1), self.codebook)  # (B, d, C)
            if d == given:
                inputs = self.embed_depths(context, codewords)  # (B, 1 + d, E)
            else:
                inputs = self.embed_next_depth(context, codewords)  # (B, 1, E)
            hidden_states = self.depth_stack(inputs, past_key_values)[:, -1:]
            scale = None if scales is None else scales[d]
            logits = self.classifier(hidden_states, first_depth=d, guidance_scale=scale)[:, 0].float()  # (B, K)
            largest = largest + logits.amax(dim=-1)
            codes = torch.cat([codes, sampler.sample(logits, uniform, d)[:, None]], dim=-1)
        return codes, largest

    def _apply_callback(self, on_position, position, codes, keep_depth) -> tuple[torch.Tensor, bool]:
        """The codes `(B, T, D)` to continue with, and whether the callback changed them."""
        code_map = codes.unflatten(1, self.config.code_shape[:2])
        replaced = on_position(position, code_map.clone())
        if replaced is None:
            return codes, False
        name = "what on_position (in a pipeline: callback_on_step_end) returns"
        self.check_codes(replaced, name)
        check_shape(name, replaced, *code_map.shape)
        if torch.equal(replaced.to(codes.device), code_map):
            return codes, False
        return self._prepare_codes(replaced, position + 1, keep_depth, len(codes)), True

    def _prepare_codes(self, prefix_codes, start, keep_depth, batch_size) -> torch.Tensor:
        """`(B, T, D)`, zero except for the codes that are kept."""
        check_prefix(prefix_codes, start, keep_depth, self.config.code_shape)
        codes = torch.zeros(
            batch_size, self.num_positions, self.config.code_shape[-1], dtype=torch.long, device=self.device
        )
        if prefix_codes is not None:
            self.check_codes(prefix_codes, "prefix_codes")
            given = prefix_codes.flatten(1, 2).to(self.device)
            codes[:, :start] = given[:, :start]
            codes[:, start:, :keep_depth] = given[:, start:, :keep_depth]
        return codes

    def _cache_dtype(self) -> torch.dtype:
        device = self.device.type
        if device == "cpu":  # where attention in bfloat16 takes several times as long
            return torch.float32
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
