"""Images from a prompt, a class, or nothing.

Shapes: `B` images, `H W` code grid, `D` quantization depth, `K` codebook size, `L` length of the condition.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_choice, check_instance, check_size
from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel
from ..models.random_numbers import Generators, check_generator
from ..models.rq_transformer.generation_settings import PerDepth, check_prefix
from .conditional_pipeline import ConditionalPipelineMixin
from .conditions import (
    ClassLabels,
    check_conditions,
    encode_conditions,
)
from .image_inputs import prepare_image
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
class RQPipelineOutput(BaseOutput):
    """
    Args:
        images: list of B PIL images (`"pil"`), array `(B, height, width, 3)` in [0, 1] (`"np"`), tensor
            `(B, 3, height, width)` in [0, 1] (`"pt"`), or the codes (`"latent"`).
        codes (`torch.Tensor` of shape `(B, H, W, D)`, int64): what the images were decoded from.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    codes: torch.Tensor


class RQPipeline(ConditionalPipelineMixin, PublishingMixin, TransformerLoraMixin, DiffusionPipeline):
    r"""
    Image generation with residual quantization (Lee et al., CVPR 2022).

    Args:
        vae ([`RQVAEModel`], or `None`): encodes images to codes and decodes them. Sampling codes alone
            (`output_type="latent"`) works without.
        transformer ([`RQTransformerModel`], or `None`): samples codes. Encoding and decoding work without.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): tokenizer of a text model.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "transformer", "tokenizer"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        vae: RQVAEModel | None,
        transformer: RQTransformerModel | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        # Compiled models and models with adapters are wrapped.
        if vae is not None and not hasattr(vae, "quantizer"):
            raise TypeError(f"vae must be an RQVAEModel, got {vae!r:.80}")
        if transformer is not None and not isinstance(getattr(transformer, "config", None), RQTransformerConfig):
            raise TypeError(f"transformer must be an RQTransformerModel, got {transformer!r:.80}")
        if tokenizer is not None:
            check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if vae is not None and transformer is not None:
            check_same_codes(vae, transformer)
        self.register_modules(vae=vae, transformer=transformer, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def guidance_scale(self) -> PerDepth:
        """That of the present or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the present or last call: the positions that are sampled, times the batches."""
        return self._num_timesteps

    def check_inputs(
        self,
        *,
        conditions,
        num_images_per_prompt,
        scorer,
        num_candidates,
        max_batch_size,
        prefix_codes,
        start,
        keep_depth,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raises `ValueError`/`TypeError` for arguments that contradict each other or do not fit the model."""
        self._require("transformer")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type != "latent" or scorer is not None:
            self._require("vae")
        check_conditions(self.transformer.config, self.tokenizer, **conditions)
        check_size("num_images_per_prompt", num_images_per_prompt)
        check_candidates(scorer, num_candidates)
        if max_batch_size is not None:
            check_size("max_batch_size", max_batch_size)
        check_prefix(prefix_codes, start, keep_depth, self.transformer.config.code_shape)
        if prefix_codes is not None:
            self.transformer.check_codes(prefix_codes, "prefix_codes")
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: ClassLabels | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: PerDepth | None = None,
        guidance_schedule: str = "constant",
        negative_prompt: str | list[str] | None = None,
        temperature: PerDepth | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: PerDepth | None = None,
        do_sample: bool | None = None,
        prefix_codes: torch.Tensor | None = None,
        start: int = 0,
        keep_depth: int = 0,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> RQPipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or list of them): for a text model, at most L tokens each; a longer one is an error.
            class_labels (`int`, or a list, tuple, array or tensor of them): for a class-conditional model, in
                [0, number of classes).
            num_images_per_prompt (`int`): images per prompt or label.
            negative_prompt (`str`, or a list, one per prompt): the condition that guidance steers away from, instead
                of no text.
            guidance_scale, guidance_schedule, temperature, top_k, top_p, do_sample, prefix_codes, start, keep_depth,
                generator: see [`RQTransformerModel.generate`]. Settings that are left out come from the model's
                `generation_config`. Lists of generators, and prefix codes, have one entry per sampled image.
            scorer (`Callable`): rejection sampling (section 4.2): images `(B, 3, height, width)` in [0, 1] and the
                list of their prompts or labels (`None` without) -> scores `(B,)`; see `rq_hf.metrics`.
            num_candidates (`int`): candidates per returned image. Of all candidates of a prompt the best
                `num_images_per_prompt` are returned, best first. 20 is the paper's acceptance rate of 5 %.
            batch_size (`int`): for an unconditional model, number of images (default 1), each of them
                `num_images_per_prompt` times.
            max_batch_size (`int`): images sampled at a time (default: all), which bounds the memory. With one
                generator per image, the images do not depend on it.
            cond_ids, negative_cond_ids (`torch.Tensor` of shape `(P, L)`, int64): instead of prompts or labels, their
                ids, such as those of [`encode_prompt`]. A scorer then gets `None` for them.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the codes.
            return_dict (`bool`): [`RQPipelineOutput`], or the tuple (images, codes).
            callback_on_step_end (`Callable`, or a callback of `diffusers.callbacks`): called after every position of
                every batch with (pipeline, step, raster index, tensors); sampling continues from the tensors it
                returns. `decode_codes(codes, num_positions=...)` shows an image that is still being sampled. Setting
                `pipeline._interrupt = True` ends the sampling; images are then decoded from the positions sampled so
                far, and codes are 0 at the others.
            callback_on_step_end_tensor_inputs (list of `str`): tensors to pass to it; there is `"codes"`. A callback
                of `diffusers.callbacks` names them itself.

        Example:

        ```python
        >>> import rq_hf
        >>> pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
        >>> pipe("fire engine").images[0].save("fire engine.png")
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
            scorer=scorer,
            num_candidates=num_candidates,
            max_batch_size=max_batch_size,
            prefix_codes=prefix_codes,
            start=start,
            keep_depth=keep_depth,
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
        check_generator(generator, num_samples)
        if prefix_codes is not None and len(prefix_codes) != num_samples:
            raise ValueError(
                f"prefix_codes must be one map per sampled image ({num_samples}), got {tuple(prefix_codes.shape)}"
            )

        # 3. Sample codes batch by batch, and score their images
        max_batch_size = num_samples if max_batch_size is None else int(max_batch_size)
        parts = batches(num_samples, max_batch_size)
        num_steps = self.transformer.num_positions - start
        self._num_timesteps = num_steps * len(parts)
        scales = (guidance_scale, self.transformer.generation_config.guidance_scale, 1.0)
        self._guidance_scale = scale = next(value for value in scales if value is not None)
        self._interrupt = False
        code_shape, device = self.transformer.config.code_shape, self._execution_device
        codes = torch.zeros(num_samples, *code_shape, dtype=torch.long, device=device)
        if prefix_codes is not None:
            codes.flatten(1, 2)[:, :start] = prefix_codes.flatten(1, 2)[:, :start].to(device)
        num_sampled = torch.full([num_samples], start)  # positions of each image that have their codes
        scores = torch.full([num_samples], -torch.inf)
        try:
            with self.progress_bar(total=self.num_timesteps) as progress_bar:
                for i, rows in enumerate(parts):
                    if self.interrupt:
                        break

                    def on_position(position, new_codes, rows=rows, first_step=i * num_steps - start):
                        progress_bar.update()
                        if callback_on_step_end is None:
                            return None
                        tensors = {"codes": new_codes} if "codes" in callback_on_step_end_tensor_inputs else {}
                        outputs = callback_on_step_end(self, first_step + position, position, tensors)
                        if self.guidance_scale is not scale:
                            raise ValueError("guidance cannot change while sampling; see guidance_schedule")
                        returned = returned_tensor(outputs, "codes")
                        if self.interrupt:
                            codes[rows] = new_codes if returned is None else returned
                            num_sampled[rows] = position + 1
                            raise Interrupted
                        return returned

                    with suppress(Interrupted):
                        codes[rows] = self.transformer.generate(
                            take(conditions.cond_ids, rows),
                            num_images=rows.stop - rows.start,
                            prefix_codes=take(prefix_codes, rows),
                            start=start,
                            keep_depth=keep_depth,
                            generator=generator[rows] if isinstance(generator, Sequence) else generator,
                            do_sample=do_sample,
                            temperature=temperature,
                            top_k=top_k,
                            top_p=top_p,
                            guidance_scale=guidance_scale,
                            guidance_schedule=guidance_schedule,
                            negative_cond_ids=take(conditions.negative_cond_ids, rows),
                            on_position=on_position,
                        )
                        num_sampled[rows] = self.transformer.num_positions
                    if scorer is not None:
                        images = self.decode_codes(
                            codes[rows], num_positions=int(num_sampled[rows.start]), output_type="pt"
                        )
                        scores[rows] = score_images(scorer, images, take(conditions.values, rows))

            # 4. Keep the best candidates
            if scorer is not None:
                best = select_best(scores, per_condition, num_images_per_prompt)
                codes, num_sampled = codes[best.to(device)], num_sampled[best]

            # 5. Decode the codes
            if output_type == "latent":
                images = codes
            else:
                batch_size = 1 if self.interrupt else max_batch_size  # images of one number of positions
                samples = [
                    self._decode(batch, num_positions=int(count[0]))
                    for batch, count in zip(codes.split(batch_size), num_sampled.split(batch_size))
                ]
                images = self.image_processor.postprocess(torch.cat(samples), output_type=output_type)
        finally:
            self.maybe_free_model_hooks()

        return RQPipelineOutput(images=images, codes=codes) if return_dict else (images, codes)

    def compile(self) -> None:
        """
        Speeds up sampling and decoding several times on the pipeline's current device; codes stay the same, but in low
        precision rounding may change individual codes.

        On a CPU: [`RQTransformerModel.pack_weights`], after which the pipeline can no longer be moved or cast, and
        decoding one image at a time. Elsewhere: [`RQTransformerModel.compile_steps`], which takes minutes in the first
        call with each number of images. For decoding see [`RQVAEModel.fuse_blocks`].
        """
        on_cpu = self._execution_device.type == "cpu"
        if self.transformer is not None:
            if on_cpu:
                self.transformer.pack_weights()
            else:
                self.transformer.compile_steps()
        if self.vae is not None:
            if on_cpu:
                self.vae.enable_slicing()
            self.vae.fuse_blocks()

    @torch.no_grad()
    def encode_image(self, image: PipelineImageInput, resize: bool = False) -> torch.Tensor:
        """Images -> their codes `(B, H, W, D)`.

        Args:
            image: PIL images, arrays `(B, height, width, 3)` or tensors `(B, 3, height, width)` in [0, 1]. PIL images
                are made white where they are transparent, and grey for an RQ-VAE of one channel.
            resize (`bool`): prepare PIL images of any size as for training: resize the shorter side to
                `vae.config.sample_size`, with bilinear filtering, and keep the centre.

        Raises:
            `ValueError`: no images; pixels outside [0, 1]; PIL images of 32-bit integers or floats; without `resize`,
                sides that the encoder cannot divide, or images of different sizes.
            `TypeError`: integer pixels, a mixture of PIL images and arrays or tensors, or `resize` without PIL images.
        """
        self._require("vae")
        config = self.vae.config
        pixels = prepare_image(image, resize, config.in_channels, config.sample_size, self.vae.pixels_per_code)
        return self.vae.get_codes(pixels.to(self._execution_device, self.vae.dtype))

    @torch.no_grad()
    def decode_codes(
        self,
        codes: torch.Tensor,
        depth: int | None = None,
        num_positions: int | None = None,
        output_type: str = "pil",
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Codes `(B, H, W, D)` -> images (`"pil"`, `"np"` or `"pt"`); with `depth=d` from the first d codes of every
        position, and with `num_positions=n` of the first n positions only (see [`RQVAEModel.decode_codes`])."""
        self._require("vae")
        check_choice("output_type", output_type, IMAGE_TYPES)
        sample = self._decode(codes, depth, num_positions)
        return self.image_processor.postprocess(sample, output_type=output_type)

    def _decode(self, codes: torch.Tensor, depth: int | None = None, num_positions: int | None = None) -> torch.Tensor:
        """Codes `(B, H, W, D)` -> pixels `(B, 3, height, width)`; `ValueError` where they are NaN or infinite."""
        return finite_pixels(self.vae.decode_codes(codes, depth, num_positions).sample)

    def reconstruct(
        self, image: PipelineImageInput, depth: int | None = None, output_type: str = "pil", resize: bool = False
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Images, encoded (see [`encode_image`] for `resize`) and decoded; with `depth=d` from the first d codes of
        every position."""
        check_choice("output_type", output_type, IMAGE_TYPES)
        return self.decode_codes(self.encode_image(image, resize), depth=depth, output_type=output_type)


def check_same_codes(vae: RQVAEModel, transformer: RQTransformerModel) -> None:
    """Raises `ValueError` unless both have codes of the same shape and, as far as they are in memory, one codebook."""
    config = vae.config
    of_vae = (config.depth, config.codebook_size, config.codebook_dim, config.shared_codebook)
    config = transformer.config
    of_transformer = (config.code_shape[-1], config.codebook_size, config.codebook_dim, config.shared_codebook)
    if of_vae != of_transformer:
        raise ValueError(
            "vae and transformer must have the same (depth, codebook size, codebook dim, shared codebook), "
            f"got {of_vae} and {of_transformer}"
        )
    codebook, copy = vae.quantizer.codebook.detach(), transformer.codebook
    if codebook.is_meta or copy.is_meta:
        return
    # Either may have been rounded, now or before it was saved: to bfloat16, or to float16 with its steps of 2⁻²⁴.
    rounding = {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 2**-24}
    if not torch.allclose(copy.to(codebook.device, torch.float32), codebook.float(), **rounding):
        raise ValueError(
            "vae and transformer have different codebooks; if the transformer models the codes of this vae, call "
            "transformer.set_codebook(vae.quantizer.codebook)"
        )
