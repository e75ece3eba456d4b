"""The denoising chain of a few tokens, given what the transformer says about their positions (Li et al., 2024, 3.2).

Shapes: `N` tokens, `C` numbers of a token, `Z` width of the decoder, `S` denoising steps.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ...argument_checks import check_integer, check_items
from .diffusion import NUM_TRAIN_TIMESTEPS, DiffusionProcess, interpolate, spaced_timesteps

if TYPE_CHECKING:
    from .diffusion_head import MARDiffusionHead

NumSteps = int | Sequence[int]
SCHEDULERS = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
NEEDED = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "thresholding": False,
}
# Numbers of modulation that are computed at a time: 128 MB in float32.
MODULATION_NUMBERS = 2**25


def default_scheduler(timestep_spacing: str = "linspace") -> DDPMScheduler:
    """
    The scheduler whose chain is the authors'.

    Their spacing, `"linspace"`, begins at t = 999, where errors of the head are multiplied by 1/√ᾱ = 20,291: with a
    head that was trained briefly, tokens explode. `"leading"` begins lower, at 960 with 25 steps.
    """
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing=timestep_spacing,
    )


def check_scheduler(scheduler: SchedulerMixin | None, temperature: float) -> None:
    """Raises `TypeError` for a scheduler of another class than [`SCHEDULERS`], `ValueError` for settings that do not
    fit the head: another noise schedule or prediction, clipping, steps that add noise of their own, or a temperature
    for a scheduler that adds none."""
    if scheduler is None:
        return
    if type(scheduler) not in SCHEDULERS:
        accepted = ", ".join(cls.__name__ for cls in SCHEDULERS)
        raise TypeError(f"scheduler must be one of {accepted}, got {scheduler!r:.80}")
    needed = dict(NEEDED)
    if isinstance(scheduler, DDPMScheduler):
        needed["variance_type"] = "learned_range"
    if isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        needed["clip_sample"] = False
    for name, value in needed.items():
        if name in scheduler.config and scheduler.config[name] != value:
            raise ValueError(
                f"the scheduler's {name} must be {value!r} for this model, got {scheduler.config[name]!r}"
            )
    if "sde" in scheduler.config.get("algorithm_type", ""):
        raise ValueError(f"the scheduler must add no noise of its own, got {scheduler.config.algorithm_type}")
    if not isinstance(scheduler, DDPMScheduler) and temperature != 1:
        raise ValueError(
            f"temperature {temperature} needs a DDPMScheduler; {type(scheduler).__name__} adds no noise that it could "
            "scale"
        )


def solver_of(scheduler: SchedulerMixin | None) -> SchedulerMixin | None:
    """A copy of a scheduler, for predictions without variances where it adds no noise."""
    if scheduler is None or isinstance(scheduler, DDPMScheduler):
        return copy.copy(scheduler)
    # Of predictions with a variance, DPM-Solver would take the first 3 channels as those of an image.
    return type(scheduler).from_config(scheduler.config, variance_type=None)


def num_steps_of(num_inference_steps: NumSteps, num_iterations: int) -> list[int]:
    """Denoising steps of every iteration: always the same, or falling linearly from a first to a last number."""
    if isinstance(num_inference_steps, list | tuple):
        check_items("num_inference_steps", num_inference_steps, 2)
        first, last = num_inference_steps
    else:
        first = last = num_inference_steps
    for number in (first, last):
        check_integer("num_inference_steps", number, 2, NUM_TRAIN_TIMESTEPS)
    between = max(num_iterations - 1, 1)
    return [round(first + (last - first) * iteration / between) for iteration in range(num_iterations)]


def denoise(
    head: "MARDiffusionHead",
    conditions: torch.Tensor,
    noise: torch.Tensor,
    scheduler: SchedulerMixin | None = None,
    *,
    temperature: float = 1.0,
    guidance_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Turns noise into tokens. The chain is computed in float32, whatever the head computes in.

    Args:
        conditions: z, `(1, N, Z)`; with guidance `(2, N, Z)`, conditional and null.
        noise: `(1 + S, N, C)`, that of the start and of every step; the last step adds none.
        scheduler: see [`solver_of`].
        guidance_scales: `(N, 1)`.

    Returns:
        tokens `(N, C)`, float32.
    """
    num_steps = len(noise) - 1
    if scheduler is None or isinstance(scheduler, DDPMScheduler):
        step = AncestralStep(chain_timesteps(scheduler, num_steps), noise, temperature)
        timesteps = step.timesteps
    else:
        scheduler.set_timesteps(num_steps, device=noise.device)
        step, timesteps = SchedulerStep(scheduler), scheduler.timesteps
    tokens = noise[0]
    for index, modulations in enumerate(modulations_of_steps(head, conditions, timesteps)):
        inputs = tokens.to(conditions.dtype)
        predicted_noise, fraction = head.denoise(inputs, modulations).float().chunk(2, dim=-1)  # (1 or 2, N, C)
        if guidance_scales is not None:
            conditional, null = predicted_noise
            predicted_noise = torch.lerp(null, conditional, guidance_scales)[None]
        tokens = step(index, tokens, predicted_noise[0], fraction[0])
    return tokens


def chain_timesteps(scheduler: DDPMScheduler | None, num_steps: int) -> torch.Tensor:
    """`(S,)` timesteps, ascending: from 0 to 999 as in the authors' code, or of another spacing of the scheduler."""
    if scheduler is None or scheduler.config.timestep_spacing == "linspace":
        return spaced_timesteps(num_steps)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps.flip(0)


class AncestralStep:
    """Reverse steps with learned variances, from the largest of the timesteps `(S,)` down (Ho et al., 2020, algorithm
    2)."""

    def __init__(self, timesteps: torch.Tensor, noise: torch.Tensor, temperature: float):
        process = DiffusionProcess.over(timesteps)
        self.timesteps = process.timesteps.flip(0)
        self._noise, self._temperature = noise, temperature
        # coef1·(recip·x_t − recipm1·ε) + coef2·x_t, as factors of x_t and ε
        coef1 = process.posterior_mean_coef1
        token_factor = coef1 * process.sqrt_recip_alphas_cumprod + process.posterior_mean_coef2
        noise_factor = coef1 * process.sqrt_recipm1_alphas_cumprod
        tables = (token_factor, noise_factor, process.posterior_log_variance_clipped, process.betas.log())
        self._tables = [table.flip(0).tolist() for table in tables]

    def __call__(self, index, tokens, predicted_noise, fraction) -> torch.Tensor:
        token_factor, noise_factor, smallest, largest = (table[index] for table in self._tables)
        mean = torch.sub(token_factor * tokens, predicted_noise, alpha=noise_factor)
        if index == len(self.timesteps) - 1:
            return mean
        std = (interpolate(fraction, smallest, largest) / 2).exp()
        return torch.addcmul(mean, std, self._noise[1 + index], value=self._temperature)


class SchedulerStep:
    """Steps of a scheduler of diffusers that adds no noise."""

    def __init__(self, scheduler: SchedulerMixin):
        self._scheduler = scheduler

    def __call__(self, index, tokens, predicted_noise, fraction) -> torch.Tensor:
        timestep = self._scheduler.timesteps[index]
        return self._scheduler.step(predicted_noise, timestep, tokens, return_dict=False)[0]


def modulations_of_steps(
    head: "MARDiffusionHead", conditions: torch.Tensor, timesteps: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """The modulations `(1 or 2, N, ·)` of every timestep `(S,)`, computed for many timesteps at a time: alone, each of
    them would read most weights of the head."""
    time = head.embed_timesteps(timesteps.to(conditions.device), conditions.dtype)[:, None, None]  # (S, 1, 1, w)
    position = head.cond_projection(conditions)  # (1 or 2, N, w)
    numbers = conditions[..., 0].numel() * (3 * len(head.layers) + 2) * position.shape[-1]
    for some in time.split(max(1, MODULATION_NUMBERS // numbers)):
        modulations = head.modulations(some, position)
        for step in range(len(some)):
            yield [modulation[step] for modulation in modulations]
