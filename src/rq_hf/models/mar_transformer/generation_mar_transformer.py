"""Sampling from the MAR transformer: everything is hidden at first, and a few tokens at a time are revealed, in random
order (Li et al., 2024, section 3.4).

Shapes: `B` images, `T` tokens in raster order, `C` numbers of a token, `L` length of the condition, `Z` width of the
decoder, `N` tokens that are revealed in one iteration in all images, `S` denoising steps.
"""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin

from ...argument_checks import check_callable, check_choice, check_dense, check_floating, check_number, check_size
from ..offloading import onload_weights
from ..random_numbers import Generators, check_generator, normal_numbers, seeded_generators, uniform_numbers
from .denoising import NumSteps, check_scheduler, num_steps_of, solver_of
from .masking import positions_of, sampling_masks

GUIDANCE_SCHEDULES = ("linear", "constant")
NUM_ITERATIONS = 64


class MARSamplingMixin:
    """`generate` of [`MARTransformerModel`]. Named unlike transformers' `GenerationMixin`: a class whose bases end in
    that gets a `generation_config` from it."""

    @onload_weights
    @torch.no_grad()
    def generate(
        self,
        cond_ids: torch.Tensor | None = None,
        num_images: int | None = None,
        num_iterations: int | None = None,
        num_inference_steps: NumSteps = 100,
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        known_latents: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        negative_cond_ids: torch.Tensor | None = None,
        scheduler: SchedulerMixin | None = None,
        generator: Generators = None,
        on_iteration: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        r"""
        Samples latents, a few tokens at a time in random order.

        Args:
            cond_ids (`torch.Tensor` of shape `(B, L)`, or `(B,)` when L = 1, int64): one condition per image.
            num_images (`int`): B of an unconditional model (default 1).
            num_iterations (`int`): passes through the transformer; each reveals at least one token (default: 64, or
                the smallest number of hidden tokens of an image if that is less).
            num_inference_steps (`int`, or two of them): denoising steps of a token, S in [2, 1000]. Two numbers: those
                of the first and of the last iteration, and linearly in between, because late tokens need fewer (Zhao
                et al., 2025, DiSA).
            temperature (`float`): factor of the noise in every denoising step, at least 0.
            guidance_scale (`float`): classifier-free guidance with scale w: ε = null + w·(conditional − null), of the
                noise that the head predicts; needs `config.null_cond_id` or `negative_cond_ids`. 1 disables it.
            guidance_schedule (`str`): `"constant"`, or `"linear"`: w − 1 is multiplied with the share of tokens that
                are known after the iteration.
            known_latents (`torch.Tensor` of shape `(B, channels, height, width)`): latents of given images, scaled
                like those of the training. Tokens that `mask` does not hide are kept.
            mask (`torch.Tensor` of shape `(B, T)`, bool): the tokens to sample; any positions, in every image at least
                one (default: all).
            negative_cond_ids (`torch.Tensor` of shape `(B, L)`, int64): the condition that guidance steers away from,
                instead of the null condition.
            scheduler ([`~diffusers.SchedulerMixin`]): how tokens are denoised (default: the authors' chain, which is
                also what a `DDPMScheduler` with learned variances stands for), see [`check_scheduler`].
            generator (`torch.Generator`, or a list of them or of seeds in [0, 2³²)): source of randomness of the
                batch; or one per image, which then does not depend on the rest of the batch (up to rounding).
            on_iteration (`Callable`): called with (iteration, latents `(B, channels, height, width)`, mask `(B, T)` of
                what is still hidden) after every iteration; sampling continues from the latents it returns, if any.
                Hidden tokens are 0.

        Returns:
            latents `(B, channels, height, width)`, float32.

        Raises:
            `ValueError` or `TypeError` before any work for arguments that contradict each other or are out of range.
        """
        self.check_dtype()
        batch_size = self._batch_size(cond_ids, num_images, known_latents, mask)
        cond_ids = self.prepare_cond_ids(cond_ids, batch_size).to(self.device)
        mask = self._prepare_mask(known_latents, mask, batch_size)  # (B, T), on the CPU
        num_iterations = resolve_num_iterations(num_iterations, mask)
        steps = num_steps_of(num_inference_steps, num_iterations)
        check_number("temperature", temperature, "be at least 0")
        check_scheduler(scheduler, temperature)
        self.check_guidance(guidance_scale, guidance_schedule, negative_cond_ids)
        check_generator(generator, batch_size)
        check_callable("on_iteration", on_iteration)
        if guidance_scale != 1:
            cond_ids = torch.cat([cond_ids, self.prepare_negative_cond_ids(negative_cond_ids, cond_ids)])

        tokens = torch.zeros(batch_size, self.config.num_tokens, self.config.token_dim, device=self.device)
        if known_latents is not None:
            known = self.patchify(known_latents.to(self.device, torch.float32))
            tokens = known.masked_fill(mask.to(self.device)[..., None], 0)
        scheduler, generator = solver_of(scheduler), seeded_generators(generator)
        orders = uniform_numbers(generator, mask.shape, torch.device("cpu")).argsort(dim=-1)
        masks = sampling_masks(orders, mask, num_iterations)
        predict_conditions, denoise_tokens = self._sampling_steps()
        for iteration, (hidden, still_hidden) in enumerate(zip(masks, masks[1:])):
            revealed = hidden & ~still_hidden
            rows, columns = revealed.nonzero(as_tuple=True)  # (N,), image by image
            conditions = predict_conditions(tokens, cond_ids, hidden, revealed)  # (1 or 2, N, Z)
            scales = None
            if guidance_scale != 1:
                scales = self._guidance_scales(guidance_scale, guidance_schedule, still_hidden)[rows].to(self.device)
            noise = normal_numbers(
                generator, (1 + steps[iteration], rows.numel(), tokens.shape[-1]), rows, self.device
            )
            tokens[rows.to(self.device), columns.to(self.device)] = denoise_tokens(
                conditions, noise, scheduler, temperature=temperature, guidance_scales=scales
            )
            if on_iteration is not None:
                tokens = self._apply_callback(on_iteration, iteration, tokens, still_hidden)
        if not tokens.isfinite().all():
            raise ValueError(
                "the model gave tokens that are NaN or infinite; in low precision, try float32, and where "
                "guidance_scale or temperature is large, a smaller one"
            )
        return self.unpatchify(tokens)

    def _sampling_steps(self) -> tuple[Callable, Callable]:
        """What takes the time of an iteration: [`_conditions_of`], and the chain of the head."""
        return self._conditions_of, self.head.sample

    def _conditions_of(self, tokens, cond_ids, hidden, revealed) -> torch.Tensor:
        """z of the tokens to reveal, `(1, N, Z)`, or `(2, N, Z)` with guidance."""
        positions, is_revealed = (None if part is None else part.to(self.device) for part in positions_of(revealed))
        halves = len(cond_ids) // len(tokens)
        positions = positions.repeat(halves, 1)  # once more for the null half
        distinct, rows = cond_ids.unique(dim=0, return_inverse=True)
        if hidden.all() and len(distinct) < len(cond_ids):  # nothing is known, so that images of one condition share z
            tokens, hidden = (part[:1].expand(len(distinct), *part.shape[1:]) for part in (tokens, hidden))
            conditions = self.predict_conditions(tokens, distinct, hidden)
            conditions = conditions[rows[:, None], positions]
        else:
            tokens, hidden = tokens.repeat(halves, 1, 1), hidden.repeat(halves, 1)
            conditions = self.predict_conditions(tokens, cond_ids, hidden, positions)
        conditions = conditions.unflatten(0, (halves, -1))  # (1 or 2, B, n, Z)
        return conditions.flatten(1, 2) if is_revealed is None else conditions[:, is_revealed]

    def _guidance_scales(self, guidance_scale, guidance_schedule, still_hidden) -> torch.Tensor:
        """Guidance scale of each image `(B, 1)`."""
        if guidance_schedule == "constant":
            return torch.full([len(still_hidden), 1], float(guidance_scale))
        # The authors count one token as hidden in the last iteration, too.
        num_hidden = still_hidden.sum(dim=-1, keepdim=True).clamp(min=1)
        return 1 + (guidance_scale - 1) * (1 - num_hidden / self.config.num_tokens)

    def _apply_callback(self, on_iteration, iteration, tokens, still_hidden) -> torch.Tensor:
        """The tokens to continue with."""
        latents = self.unpatchify(tokens)
        replaced = on_iteration(iteration, latents, still_hidden)
        if replaced is None:
            return tokens
        name = "what on_iteration (in a pipeline: callback_on_step_end) returns"
        check_floating(name, replaced, *latents.shape)
        return self.patchify(replaced.to(tokens)).masked_fill(still_hidden.to(self.device)[..., None], 0)

    def _prepare_mask(self, known_latents, mask, batch_size) -> torch.Tensor:
        if (known_latents is None) != (mask is None):
            given, missing = ("mask", "known_latents") if known_latents is None else ("known_latents", "mask")
            raise ValueError(f"known_latents and mask go together, got {given} without {missing}")
        if mask is None:
            return torch.ones(batch_size, self.config.num_tokens, dtype=torch.bool)
        self.check_mask(mask, batch_size)
        self.check_latents(known_latents, "known_latents")
        if not known_latents.isfinite().all():
            raise ValueError("known_latents must be finite, got NaN or infinite values")
        return mask.cpu()

    def check_guidance(
        self, guidance_scale: float, guidance_schedule: str, negative_cond_ids: torch.Tensor | None
    ) -> None:
        """Raises `ValueError`/`TypeError` for guidance that this model cannot give, see [`generate`]."""
        check_number("guidance_scale", guidance_scale, "be at least 0")
        check_choice("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES)
        if guidance_scale == 1 and negative_cond_ids is not None:
            raise ValueError("negative_cond_ids need a guidance_scale other than 1")
        if guidance_scale != 1 and self.config.null_cond_id is None and negative_cond_ids is None:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs a model with a null condition (config.null_cond_id), or "
                "negative_cond_ids"
            )

    def _batch_size(self, cond_ids, num_images, known_latents, mask) -> int:
        """The batch size that the arguments agree on, 1 without any."""
        sizes = {}
        for name, rows in (("cond_ids", cond_ids), ("known_latents", known_latents), ("mask", mask)):
            if rows is not None:
                check_dense(name, rows)
                if not rows.ndim or not len(rows):
                    raise ValueError(f"{name} must have at least one row, got the shape {tuple(rows.shape)}")
                sizes[name] = len(rows)
        if num_images is not None:
            check_size("num_images", num_images)
            sizes["num_images"] = int(num_images)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"arguments disagree on the batch size: {sizes}")
        return next(iter(sizes.values()), 1)


def resolve_num_iterations(num_iterations: int | None, mask: torch.Tensor) -> int:
    """The number of iterations for what `mask` `(B, T)` hides. Raises `ValueError` for more iterations than tokens."""
    fewest = int(mask.sum(dim=-1).min())
    if num_iterations is None:
        return min(NUM_ITERATIONS, fewest)
    check_size("num_iterations", num_iterations)
    if num_iterations > fewest:
        raise ValueError(
            f"num_iterations must be at most the number of tokens to sample in an image, {fewest}, "
            f"got {num_iterations}"
        )
    return int(num_iterations)
