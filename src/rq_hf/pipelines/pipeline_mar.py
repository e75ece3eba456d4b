"""Images from a prompt, a class, or nothing, and new content for any part of given images: continuous tokens.

Shapes: `B` images, latents `(B, channels, height, width)`, `T` tokens in raster order, `L` length of the condition.
Masks are boolean, true where a token is hidden.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from transformers import PreTrainedTokenizerBase

from ..argument_checks import (
    check_choice,
    check_dense,
    check_finite,
    check_instance,
    check_number,
    check_size,
    check_values,
)
from ..models import MARTransformerConfig, MARTransformerModel, RQVAEModel, continuous_latents
from ..models.continuous_latents import Autoencoder
from ..models.mar_transformer.denoising import NumSteps, check_scheduler, num_steps_of
from ..models.mar_transformer.generation_mar_transformer import resolve_num_iterations
from ..models.random_numbers import Generators, check_generator, seeded_generators, uniform_numbers
from .conditional_pipeline import ConditionalPipelineMixin
from .conditions import (
    ClassLabels,
    check_conditions,
    encode_conditions,
)
from .image_inputs import mask_tokens, prepare_image, prepare_mask_image
from .lora import TransformerLoraMixin
from .publishing import PublishingMixin
from .rejection_sampling import Scorer, check_candidates, score_images, select_best
from .sampling import (
    IMAGE_TYPES,
    OUTPUT_TYPES,
    Interrupted,
    batches,
    check_callback,
    finite_pixels,
    returned_tensor,
    take,
)


@dataclass
class MARPipelineOutput(BaseOutput):
    """
    Args:
        images: list of B PIL images (`"pil"`), array `(B, height, width, 3)` in [0, 1] (`"np"`), tensor
            `(B, 3, height, width)` in [0, 1] (`"pt"`), or the latents (`"latent"`).
        latents (`torch.Tensor` of shape `(B, channels, height, width)`, float32): what the images were decoded from,
            scaled as for the transformer.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor


class MARPipeline(ConditionalPipelineMixin, PublishingMixin, TransformerLoraMixin, DiffusionPipeline):
    r"""
    Image generation with a masked autoregressive model of continuous tokens (Li et al., NeurIPS 2024).

    Args:
        vae ([`~diffusers.AutoencoderKL`], [`RQVAEModel`], or `None`): encodes images to latents and decodes them; of
            an `RQVAEModel`, those before its quantizer. Sampling latents alone (`output_type="latent"`) works without.
        transformer ([`MARTransformerModel`], or `None`): samples latents. Encoding and decoding work without.
        scheduler ([`~diffusers.DDPMScheduler`], `DDIMScheduler`, `DPMSolverMultistepScheduler`,
            `UniPCMultistepScheduler`, or `None`): how tokens are denoised. [`default_scheduler`] makes that of the
            authors' chain; others are made of it by their `from_config(pipe.scheduler.config)`. Encoding and decoding
            work without.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): tokenizer of a text model.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "transformer", "scheduler", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: Autoencoder | None,
        transformer: MARTransformerModel | None,
        scheduler: SchedulerMixin | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        # Compiled models and models with adapters are wrapped.
        if vae is not None:
            continuous_latents.check_autoencoder(unwrapped(vae))
        if transformer is not None and not isinstance(getattr(transformer, "config", None), MARTransformerConfig):
            raise TypeError(f"transformer must be a MARTransformerModel, got {transformer!r:.80}")
        check_scheduler(scheduler, temperature=1.0)
        if tokenizer is not None:
            check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if vae is not None and transformer is not None:
            check_same_channels(unwrapped(vae), transformer)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def guidance_scale(self) -> float:
        """That of the present or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the present or last call: the iterations, times the batches."""
        return self._num_timesteps

    def check_inputs(
        self,
        *,
        conditions,
        num_images_per_prompt,
        temperature,
        image,
        known_latents,
        mask_image,
        mask,
        strength,
        scorer,
        num_candidates,
        max_batch_size,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raises `ValueError`/`TypeError` for arguments that contradict each other or do not fit the model."""
        self._require("transformer")
        self._require("scheduler")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type != "latent" or scorer is not None or image is not None or mask_image is not None:
            self._require("vae")
        check_conditions(self.transformer.config, self.tokenizer, **conditions)
        check_size("num_images_per_prompt", num_images_per_prompt)
        check_number("temperature", temperature, "be at least 0")
        check_scheduler(self.scheduler, temperature)
        check_given_and_hidden(
            {"image": image, "known_latents": known_latents},
            {"mask_image": mask_image, "mask": mask, "strength": strength},
        )
        if strength is not None:
            check_number("strength", strength, "lie in (0, 1]")
        check_candidates(scorer, num_candidates)
        if max_batch_size is not None:
            check_size("max_batch_size", max_batch_size)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: ClassLabels | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        negative_prompt: str | list[str] | None = None,
        temperature: float = 1.0,
        num_iterations: int | None = None,
        num_inference_steps: NumSteps = 100,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        known_latents: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: Generators = None,
        scorer: Scorer | None = None,
        num_candidates: int = 1,
        batch_size: int | None = None,
        max_batch_size: int | None = None,
        cond_ids: torch.Tensor | None = None,
        negative_cond_ids: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MARPipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or list of them): for a text model, at most L tokens each; a longer one is an error.
            class_labels (`int`, or a list, tuple, array or tensor of them): for a class-conditional model, in
                [0, number of classes).
            num_images_per_prompt (`int`): images per prompt or label.
            negative_prompt (`str`, or a list, one per prompt): the condition that guidance steers away from, instead
                of no text.
            guidance_scale, guidance_schedule, temperature, num_iterations, num_inference_steps, generator: see
                [`MARTransformerModel.generate`]. Lists of generators have one entry per sampled image.
            image: given images, of which a part is kept, in a form that [`encode_image`] takes: one, or one per
                sampled image, as large as the images that the model samples.
            mask_image: which part of them is sampled anew (inpainting; at their edges, outpainting), white: PIL
                images, or arrays or tensors of the same height and width in [0, 1], one or one per sampled image. A
                token is sampled if any of its pixels is white. Tokens are decoded together, so that pixels beside the
                white ones change a little; `pipe.image_processor.apply_overlay(mask_image, image, result)` pastes
                them back.
            strength (`float`): instead of a mask, the share of tokens to sample anew, in (0, 1]: other ones in each
                image, at random (variations).
            known_latents (`torch.Tensor` of shape `(B, channels, height, width)`): instead of `image`, the latents of
                one, or one per sampled image.
            mask (`torch.Tensor` of shape `(B, T)`, bool): instead of `mask_image`, the tokens to sample, of one image
                or one per sampled image.
            scorer (`Callable`): rejection sampling: images `(B, 3, height, width)` in [0, 1] and the list of their
                prompts or labels (`None` without) -> scores `(B,)`; see `rq_hf.metrics`.
            num_candidates (`int`): candidates per returned image. Of all candidates of a prompt the best
                `num_images_per_prompt` are returned, best first.
            batch_size (`int`): for an unconditional model, number of images (default 1), each of them
                `num_images_per_prompt` times.
            max_batch_size (`int`): images sampled at a time (default: all), which bounds the memory. With one
                generator per image, the images do not depend on it (up to rounding).
            cond_ids, negative_cond_ids (`torch.Tensor` of shape `(P, L)`, int64): instead of prompts or labels, their
                ids, such as those of [`encode_prompt`]. A scorer then gets `None` for them.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the latents.
            return_dict (`bool`): [`MARPipelineOutput`], or the tuple (images, latents).
            callback_on_step_end (`Callable`, or a callback of `diffusers.callbacks`): called after every iteration of
                every batch with (pipeline, step, iteration, tensors); sampling continues from the tensors it returns.
                [`decode_latents`] shows an image that is still being sampled; its hidden tokens are 0. Setting
                `pipeline._interrupt = True` ends the sampling and returns the images as they are then.
            callback_on_step_end_tensor_inputs (list of `str`): tensors to pass to it; there is `"latents"`. A callback
                of `diffusers.callbacks` names them itself.

        Example:

        ```python
        >>> import rq_hf
        >>> pipe = rq_hf.MARPipeline.from_pretrained(folder)
        >>> image = pipe("fire engine", num_iterations=8, num_inference_steps=25).images[0]
        >>> other = pipe("red apple", image=image, mask_image=mask).images[0]
        ```
        """
        # 1. Check the arguments
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "class_labels": class_labels,
            "cond_ids": cond_ids,
            "negative_cond_ids": negative_cond_ids,
            "batch_size": batch_size,
        }
        self.check_inputs(
            conditions=given,
            num_images_per_prompt=num_images_per_prompt,
            temperature=temperature,
            image=image,
            known_latents=known_latents,
            mask_image=mask_image,
            mask=mask,
            strength=strength,
            scorer=scorer,
            num_candidates=num_candidates,
            max_batch_size=max_batch_size,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 2. Encode the conditions, one for each image that is sampled
        conditions = encode_conditions(self.transformer.config, self.tokenizer, **given)
        num_images_per_prompt = int(num_images_per_prompt)
        per_condition = num_images_per_prompt * int(num_candidates)
        conditions = conditions.repeat(per_condition)
        num_samples = conditions.count
        self.transformer.check_guidance(guidance_scale, guidance_schedule, conditions.negative_cond_ids)
        check_generator(generator, num_samples)
        generator = seeded_generators(generator)

        # 3. Hide what is sampled, and encode what is given
        max_batch_size = num_samples if max_batch_size is None else int(max_batch_size)
        if mask_image is not None:
            mask = self._mask_of_image(mask_image)
        elif strength is not None:
            mask = random_masks(generator, num_samples, self.transformer.config.num_tokens, strength)
        if mask is not None:
            mask = self._one_per_sample("mask_image" if mask_image is not None else "mask", mask, num_samples)
            self.transformer.check_mask(mask, num_samples)
        all_hidden = torch.ones(num_samples, self.transformer.config.num_tokens, dtype=torch.bool)
        num_iterations = resolve_num_iterations(num_iterations, all_hidden if mask is None else mask)
        num_steps_of(num_inference_steps, num_iterations)  # refuses other numbers
        if image is not None:
            known_latents = self._encode_given(image, num_samples, max_batch_size)
        if known_latents is not None:
            known_latents = self._one_per_sample("known_latents", known_latents, num_samples)
            self.transformer.check_latents(known_latents, "known_latents")
            check_finite("known_latents", known_latents)

        # 4. Sample latents batch by batch, and score their images
        parts = batches(num_samples, max_batch_size)
        self._num_timesteps = num_iterations * len(parts)
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device
        latents = torch.zeros(num_samples, *self.transformer.config.latent_shape, device=device)
        if known_latents is not None:
            known_tokens = self.transformer.patchify(known_latents.to(latents))
            latents = self.transformer.unpatchify(known_tokens.masked_fill(mask.to(device)[..., None], 0))
        scores = torch.full([num_samples], -torch.inf)
        try:
            with self.progress_bar(total=self.num_timesteps) as progress_bar:
                for i, rows in enumerate(parts):
                    if self.interrupt:
                        break

                    def on_iteration(iteration, new_latents, _, rows=rows, first_step=i * num_iterations):
                        progress_bar.update()
                        if callback_on_step_end is None:
                            return None
                        tensors = {"latents": new_latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                        outputs = callback_on_step_end(self, first_step + iteration, iteration, tensors)
                        if self.guidance_scale is not guidance_scale:
                            raise ValueError("guidance cannot change while sampling; see guidance_schedule")
                        returned = returned_tensor(outputs, "latents")
                        if self.interrupt:
                            latents[rows] = new_latents if returned is None else returned
                            raise Interrupted
                        return returned

                    with suppress(Interrupted):
                        latents[rows] = self.transformer.generate(
                            take(conditions.cond_ids, rows),
                            num_images=rows.stop - rows.start,
                            num_iterations=num_iterations,
                            num_inference_steps=num_inference_steps,
                            temperature=temperature,
                            guidance_scale=guidance_scale,
                            guidance_schedule=guidance_schedule,
                            known_latents=take(known_latents, rows),
                            mask=take(mask, rows),
                            negative_cond_ids=take(conditions.negative_cond_ids, rows),
                            scheduler=self.scheduler,
                            generator=generator[rows] if isinstance(generator, list) else generator,
                            on_iteration=on_iteration,
                        )
                    if scorer is not None:
                        images = self.decode_latents(latents[rows], output_type="pt")
                        scores[rows] = score_images(scorer, images, take(conditions.values, rows))

            # 5. Keep the best candidates
            if scorer is not None:
                latents = latents[select_best(scores, per_condition, num_images_per_prompt).to(device)]

            # 6. Decode the latents
            if output_type == "latent":
                images = latents
            else:
                samples = [self._decode(batch) for batch in latents.split(max_batch_size)]
                images = self.image_processor.postprocess(torch.cat(samples), output_type=output_type)
        finally:
            self.maybe_free_model_hooks()

        return MARPipelineOutput(images=images, latents=latents) if return_dict else (images, latents)

    @property
    def _pixels_per_token(self) -> tuple[int, int]:
        """Rows and columns of pixels."""
        rows, columns = continuous_latents.pixels_per_latent(unwrapped(self.vae))
        return rows * self.transformer.config.patch_size, columns * self.transformer.config.patch_size

    @property
    def _image_size(self) -> tuple[int, int]:
        """Height and width of the images that are sampled."""
        return tuple(n * pixels for n, pixels in zip(self.transformer.config.grid_size, self._pixels_per_token))

    def _mask_of_image(self, mask_image: PipelineImageInput) -> torch.Tensor:
        """The tokens that a mask of pixels hides, `(B, T)`."""
        pixel_mask = prepare_mask_image(mask_image, *self._image_size)
        if not pixel_mask.flatten(1).any(dim=1).all():
            raise ValueError("mask_image must be white somewhere, got a mask that hides nothing")
        return mask_tokens(pixel_mask, self._pixels_per_token)

    def _encode_given(self, image: PipelineImageInput, num_samples: int, max_batch_size: int) -> torch.Tensor:
        """Latents of one image, or one per sampled image."""
        pixels = self._pixels_of(image, resize=False)
        if tuple(pixels.shape[2:]) != self._image_size:
            height, width = self._image_size
            raise ValueError(
                f"image must have the width and height {width}×{height} of sampled images, got "
                f"{pixels.shape[3]}×{pixels.shape[2]}; for PIL images of other sizes see "
                "known_latents=pipe.encode_image(image, resize=True)"
            )
        if len(pixels) not in (1, num_samples):
            raise ValueError(f"image must be one, or one per sampled image ({num_samples}), got {len(pixels)}")
        return torch.cat([self._encode(part) for part in pixels.split(max_batch_size)])

    @staticmethod
    def _one_per_sample(name: str, rows: torch.Tensor, num_samples: int) -> torch.Tensor:
        """One row for every sampled image."""
        check_dense(name, rows)
        if rows.ndim == 0 or len(rows) not in (1, num_samples):
            raise ValueError(f"{name} must be one, or one per sampled image ({num_samples}), got {tuple(rows.shape)}")
        return rows.expand(num_samples, *rows.shape[1:])

    def compile(self) -> None:
        """
        Speeds up sampling on a CPU, and decoding; latents stay the same, up to rounding.

        On a CPU: [`MARTransformerModel.pack_weights`], after which the pipeline can no longer be moved or cast, and
        decoding one image at a time. For decoding with an `RQVAEModel` see [`RQVAEModel.fuse_blocks`].
        """
        on_cpu = self._execution_device.type == "cpu"
        if self.transformer is not None and on_cpu:
            self.transformer.pack_weights()
        if self.vae is not None:
            if on_cpu:
                self.vae.enable_slicing()
            if isinstance(unwrapped(self.vae), RQVAEModel):
                self.vae.fuse_blocks()

    @torch.no_grad()
    def encode_image(self, image: PipelineImageInput, resize: bool = False) -> torch.Tensor:
        """Images -> their latents `(B, channels, height, width)`, scaled as for the transformer, float32; of an
        `AutoencoderKL`, the means.

        Args:
            image: PIL images, arrays `(B, height, width, 3)` or tensors `(B, 3, height, width)` in [0, 1]. PIL images
                are made white where they are transparent, and grey for a vae of one channel.
            resize (`bool`): prepare PIL images of any size as for training: resize the shorter side to
                `vae.config.sample_size`, with bilinear filtering, and keep the centre.

        Raises:
            `ValueError`: no images; pixels outside [0, 1]; PIL images of 32-bit integers or floats; without `resize`,
                sides that the encoder cannot divide, or images of different sizes.
            `TypeError`: integer pixels, a mixture of PIL images and arrays or tensors, or `resize` without PIL images.
        """
        self._require("vae")
        return self._encode(self._pixels_of(image, resize))

    def _pixels_of(self, image: PipelineImageInput, resize: bool) -> torch.Tensor:
        """`(B, 3, height, width)` in [-1, 1]."""
        config = self.vae.config
        pixels_per_latent = continuous_latents.pixels_per_latent(unwrapped(self.vae))
        return prepare_image(image, resize, config.in_channels, config.sample_size, pixels_per_latent)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return continuous_latents.encode_latents(
            unwrapped(self.vae), pixels.to(self._execution_device, self.vae.dtype)
        )

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Latents `(B, channels, height, width)`, scaled as for the transformer -> images (`"pil"`, `"np"` or
        `"pt"`)."""
        self._require("vae")
        check_choice("output_type", output_type, IMAGE_TYPES)
        check_dense("latents", latents)
        check_values("latents", latents)
        return self.image_processor.postprocess(self._decode(latents), output_type=output_type)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, channels, height, width)` -> pixels `(B, 3, height, width)`; `ValueError` where they are NaN or
        infinite."""
        return finite_pixels(continuous_latents.decode_latents(unwrapped(self.vae), latents))

    def reconstruct(
        self, image: PipelineImageInput, output_type: str = "pil", resize: bool = False
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Images, encoded (see [`encode_image`] for `resize`) and decoded."""
        check_choice("output_type", output_type, IMAGE_TYPES)
        return self.decode_latents(self.encode_image(image, resize), output_type)


def unwrapped(vae: Autoencoder) -> Autoencoder:
    """The autoencoder itself where it is compiled, which concerns only its `forward`."""
    return vae._orig_mod if is_compiled_module(vae) else vae


def random_masks(generator: Generators, count: int, num_tokens: int, share: float) -> torch.Tensor:
    """Masks `(B, T)` that hide `share` of the tokens, rounded up, at random in each image."""
    numbers = uniform_numbers(generator, (count, num_tokens), torch.device("cpu"))
    return numbers.argsort(dim=-1).argsort(dim=-1) < math.ceil(num_tokens * share)


def check_given_and_hidden(given: dict, hidden: dict) -> None:
    """Raises `ValueError` unless there is one of both or none of either; values are `None` where there is none."""
    names = []
    for arguments in (given, hidden):
        present = [name for name, value in arguments.items() if value is not None]
        if len(present) > 1:
            raise ValueError(f"give either {' or '.join(present)}, not both")
        names.append(present)
    for (present, other), accepted in ((names, hidden), (names[::-1], given)):
        if present and not other:
            raise ValueError(f"{present[0]} goes with one of {', '.join(accepted)}, got {present[0]} alone")


def check_same_channels(vae: Autoencoder, transformer: MARTransformerModel) -> None:
    """Raises `ValueError` unless both have latents of the same number of channels."""
    of_vae, of_transformer = continuous_latents.latent_shape(vae)[0], transformer.config.latent_shape[0]
    if of_vae != of_transformer:
        raise ValueError(
            f"vae and transformer must have the same channels of their latents, got {of_vae} and {of_transformer}"
        )
