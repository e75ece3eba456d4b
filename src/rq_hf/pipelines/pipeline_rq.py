"""Prompt (or class, or nothing) in, pictures out.

Shapes: `B` images, `H W` code grid, `D` quantization depth, `K` codebook size, `L` length of the condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerBase

from ..images import to_rgb
from ..models import RQTransformerModel, RQVAEModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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


class RQPipeline(DiffusionPipeline):
    r"""
    Image generation with residual quantization (Lee et al., CVPR 2022).

    Args:
        vae ([`RQVAEModel`]): turns codes into pictures and back.
        transformer ([`RQTransformerModel`]): draws codes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): of a text model.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        vae: RQVAEModel,
        transformer: RQTransformerModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        ours = (vae.config.depth, vae.config.codebook_size, vae.config.codebook_dim, vae.config.shared_codebook)
        config = transformer.config
        theirs = (config.code_shape[-1], config.codebook_size, config.codebook_dim, config.shared_codebook)
        if ours != theirs:
            raise ValueError(
                "vae and transformer must agree in (depth, codebook size, codebook dim, shared codebook), "
                f"got {ours} and {theirs}"
            )
        self.register_modules(vae=vae, transformer=transformer, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def is_text_conditional(self) -> bool:
        return self.transformer.config.cond_length > 1

    @property
    def is_class_conditional(self) -> bool:
        return not self.is_text_conditional and self.transformer.config.cond_vocab_size > 1

    def check_inputs(
        self,
        prompt,
        class_labels,
        num_images_per_prompt,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raises `ValueError`/`TypeError` for arguments that contradict each other or do not fit the model."""
        if prompt is not None and class_labels is not None:
            raise ValueError("give either prompt or class_labels, not both")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        if prompt is not None:
            if not self.is_text_conditional:
                kind = "class_labels" if self.is_class_conditional else "neither a prompt nor class_labels"
                raise ValueError(f"this model takes {kind}, got prompt={prompt!r}")
            if self.tokenizer is None:
                raise ValueError(
                    "this pipeline has no tokenizer, which a prompt needs: pass tokenizer= when loading it"
                )
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise TypeError(f"prompt must be a string or a list of strings, got {prompt!r}")
        elif self.is_text_conditional:
            raise ValueError("this model needs a prompt")
        if class_labels is not None:
            if not self.is_class_conditional:
                raise ValueError(
                    f"this model takes neither a prompt nor class_labels, got class_labels={class_labels!r}"
                )
            self._check_class_labels([class_labels] if isinstance(class_labels, int) else class_labels)
        elif self.is_class_conditional:
            raise ValueError("this model needs class_labels")

    def _check_class_labels(self, labels) -> None:
        if not isinstance(labels, list) or not labels or not all(isinstance(label, int) for label in labels):
            raise TypeError(f"class_labels must be an integer or a list of integers, got {labels!r}")
        config = self.transformer.config
        outside = [x for x in labels if not 0 <= x < config.cond_vocab_size or x == config.null_cond_id]
        if outside:
            num_classes = config.cond_vocab_size - (config.null_cond_id is not None)
            raise ValueError(f"class_labels must lie among the {num_classes} classes from 0 on, got {outside}")

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Prompts -> condition ids `(B, L)`, padded on the right.

        Raises `ValueError` for a prompt of more than L tokens; nothing is cut off silently.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        length = self.transformer.config.cond_length
        ids = self.tokenizer(prompts, padding="max_length", max_length=length)["input_ids"]
        for text, row in zip(prompts, ids):
            if len(row) > length:
                raise ValueError(f"a prompt may have at most {length} tokens, got {len(row)} for {text!r}")
        return torch.tensor(ids)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        do_sample: bool | None = None,
        prefix_codes: torch.Tensor | None = None,
        start: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> RQPipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or list of them): of a text model, at most L tokens each; a longer one is an error.
            class_labels (`int` or list of them): of a class-conditional model, from 0 on.
            num_images_per_prompt (`int`): pictures per prompt or label; of an unconditional model, how many in all.
            guidance_scale, temperature, top_k, top_p, do_sample, prefix_codes, start, generator: see
                [`RQTransformerModel.generate`]; what is left out comes from the model's `generation_config`.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`, which gives the codes.
            return_dict (`bool`): [`RQPipelineOutput`], or the tuple (images, codes).
            callback_on_step_end (`Callable`): called after every position with (pipeline, step, raster index,
                tensors); the tensors it returns are continued from.
            callback_on_step_end_tensor_inputs (list of `str`): tensors to pass to it; there is `"codes"`.

        Example:

        ```python
        >>> import rq_hf
        >>> pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
        >>> pipe("fire engine").images[0].save("fire engine.png")
        ```
        """
        self.check_inputs(prompt, class_labels, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        cond_ids = None
        if prompt is not None:
            cond_ids = self.encode_prompt(prompt)
        elif class_labels is not None:
            cond_ids = torch.tensor([class_labels] if isinstance(class_labels, int) else class_labels)[:, None]
        if cond_ids is not None:
            cond_ids = cond_ids.repeat_interleave(num_images_per_prompt, dim=0).to(device)

        height, width, _ = self.transformer.config.code_shape
        with self.progress_bar(total=height * width - start) as progress_bar:

            def on_position(position, codes):
                progress_bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"codes": codes} if "codes" in callback_on_step_end_tensor_inputs else {}
                outputs = callback_on_step_end(self, position - start, position, tensors)
                return None if outputs is None else outputs.get("codes")

            codes = self.transformer.generate(
                cond_ids,
                num_images=num_images_per_prompt if cond_ids is None else None,
                prefix_codes=prefix_codes,
                start=start,
                generator=generator,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guidance_scale=guidance_scale,
                on_position=on_position,
            )
        images = codes if output_type == "latent" else self.decode_codes(codes, output_type=output_type)
        self.maybe_free_model_hooks()
        return RQPipelineOutput(images=images, codes=codes) if return_dict else (images, codes)

    @torch.no_grad()
    def encode_image(self, image: PipelineImageInput) -> torch.Tensor:
        """Pictures (PIL, arrays `(B, height, width, 3)` or tensors `(B, 3, height, width)` in [0, 1]) -> codes.

        PIL pictures become grey for an RQ-VAE of one channel. They are not resized: raises `ValueError` where the
        encoder cannot divide their sides, and `TypeError` for pixels that are integers.
        """
        rows, columns = self.vae.pixels_per_code
        mode = "L" if self.vae.config.in_channels == 1 else "RGB"
        images = image if isinstance(image, list) else [image]
        images = [to_rgb(i).convert(mode) if isinstance(i, PIL.Image.Image) else i for i in images]
        sizes = {i.size for i in images if isinstance(i, PIL.Image.Image)}
        if len(sizes) > 1:
            raise ValueError(f"pictures of one batch must have one size, got {sorted(sizes)}")
        if any(width % columns or height % rows for width, height in sizes):
            raise ValueError(f"width and height must be divisible by {columns} and {rows}, got {sizes.pop()}")
        for i in images:
            if not isinstance(i, PIL.Image.Image) and not torch.as_tensor(i).is_floating_point():
                raise TypeError(f"arrays and tensors must be floating point in [0, 1], got {i.dtype}")
        pixels = self.image_processor.preprocess(images if sizes else image)
        return self.vae.get_codes(pixels.to(self._execution_device, self.vae.dtype))

    @torch.no_grad()
    def decode_codes(
        self, codes: torch.Tensor, depth: int | None = None, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Codes `(B, H, W, D)` -> pictures; with `depth=d` from the first d codes of every position."""
        sample = self.vae.decode_codes(codes, depth=depth).sample
        return self.image_processor.postprocess(sample.float(), output_type=output_type)

    def reconstruct(
        self, image: PipelineImageInput, depth: int | None = None, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Pictures through the code map and back; with `depth=d` from the first d codes of every position."""
        return self.decode_codes(self.encode_image(image), depth=depth, output_type=output_type)
