"""Prompt (or class, or nothing) in, pictures out.

Shapes: `B` images, `H W` code grid, `D` quantization depth, `K` codebook size, `L` length of the condition.
"""

import itertools
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
from ..models.rq_transformer.code_sampling import Generators, check_generator
from ..models.rq_transformer.generation_rq_transformer import PerDepth
from ..text import encode_captions

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Scorer = Callable[[torch.Tensor, list | None], torch.Tensor]


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
        negative_prompt=None,
        scorer=None,
        num_candidates=1,
        batch_size=None,
    ) -> None:
        """Raises `ValueError`/`TypeError` for arguments that contradict each other or do not fit the model."""
        if prompt is not None and class_labels is not None:
            raise ValueError("give either prompt or class_labels, not both")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        if (scorer is None) != (num_candidates == 1):
            raise ValueError(
                "a scorer and num_candidates > 1 belong together, got "
                f"{'no scorer' if scorer is None else 'a scorer'} and {num_candidates=}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        if negative_prompt is not None and prompt is None:
            raise ValueError(f"negative_prompt goes with a prompt, got {negative_prompt=} alone")
        if prompt is not None:
            if not self.is_text_conditional:
                kind = "class_labels" if self.is_class_conditional else "neither a prompt nor class_labels"
                raise ValueError(f"this model takes {kind}, got prompt={prompt!r}")
            if self.tokenizer is None:
                raise ValueError(
                    "this pipeline has no tokenizer, which a prompt needs: pass tokenizer= when loading it"
                )
            for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
                texts = [value] if isinstance(value, str) else value
                if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
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
        token_ids, num_tokens = encode_captions(self.tokenizer, prompts, length)
        for text, count in zip(prompts, num_tokens):
            if count > length:
                raise ValueError(f"a prompt may have at most {length} tokens, got {count} for {text!r}")
        return token_ids

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | None = None,
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
            negative_prompt (`str`, or a list, one per prompt): what guidance leads away from, instead of no text.
            guidance_scale, guidance_schedule, temperature, top_k, top_p, do_sample, prefix_codes, start, keep_depth,
                generator: see [`RQTransformerModel.generate`]; what is left out comes from the model's
                `generation_config`. Generators and prefix codes are one per picture that is drawn.
            scorer (`Callable`): rejection sampling (section 4.2): pictures `(B, 3, height, width)` in [0, 1] and the
                list of their prompts or labels (`None` without) -> scores `(B,)`; see `rq_hf.scoring`.
            num_candidates (`int`): so many pictures are drawn for each one that is returned: of all candidates of a
                prompt the best `num_images_per_prompt`, best first. 20 is the paper's acceptance rate of 5 %.
            batch_size (`int`): pictures drawn at a time (default: all), which bounds the memory. With a generator per
                picture they do not depend on it.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`, which gives the codes.
            return_dict (`bool`): [`RQPipelineOutput`], or the tuple (images, codes).
            callback_on_step_end (`Callable`): called after every position of every batch with (pipeline, step, raster
                index, tensors); the tensors it returns are continued from. `decode_codes(codes, num_positions=...)`
                shows a picture that is being drawn.
            callback_on_step_end_tensor_inputs (list of `str`): tensors to pass to it; there is `"codes"`.

        Example:

        ```python
        >>> import rq_hf
        >>> pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
        >>> pipe("fire engine").images[0].save("fire engine.png")
        ```
        """
        self.check_inputs(
            prompt,
            class_labels,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
            negative_prompt,
            scorer,
            num_candidates,
            batch_size,
        )
        conditions, cond_ids, negative_ids = self._encode_conditions(prompt, class_labels, negative_prompt)
        per_condition = num_images_per_prompt * num_candidates
        total = per_condition * (1 if conditions is None else len(conditions))
        batch_size = batch_size or total
        check_generator(generator, total)
        if prefix_codes is not None and len(prefix_codes) != total:
            raise ValueError(f"prefix_codes must be one map per picture drawn ({total}), got {len(prefix_codes)}")

        height, width, _ = self.transformer.config.code_shape
        batches = torch.arange(total).split(batch_size)
        all_codes, scores, step = [], [], itertools.count()
        with self.progress_bar(total=(height * width - start) * len(batches)) as progress_bar:

            def on_position(position, codes):
                progress_bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"codes": codes} if "codes" in callback_on_step_end_tensor_inputs else {}
                outputs = callback_on_step_end(self, next(step), position, tensors)
                return None if outputs is None else outputs.get("codes")

            for rows in batches:
                condition = rows // per_condition
                codes = self.transformer.generate(
                    None if cond_ids is None else cond_ids[condition].to(self._execution_device),
                    num_images=len(rows),
                    prefix_codes=None if prefix_codes is None else prefix_codes[rows],
                    start=start,
                    keep_depth=keep_depth,
                    generator=[generator[row] for row in rows] if isinstance(generator, Sequence) else generator,
                    do_sample=do_sample,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    guidance_scale=guidance_scale,
                    guidance_schedule=guidance_schedule,
                    negative_cond_ids=None if negative_ids is None else negative_ids[condition],
                    on_position=on_position,
                )
                all_codes.append(codes)
                if scorer is not None:
                    given = None if conditions is None else [conditions[i] for i in condition]
                    scores.append(self._score(scorer, self.decode_codes(codes, output_type="pt"), given))

        codes = torch.cat(all_codes)
        if scorer is not None:
            best = torch.cat(scores).view(-1, per_condition).topk(num_images_per_prompt, dim=-1).indices
            codes = codes.unflatten(0, (-1, per_condition))[torch.arange(len(best))[:, None], best].flatten(0, 1)
        images = codes
        if output_type != "latent":
            samples = [self.vae.decode_codes(batch).sample.float() for batch in codes.split(batch_size)]
            images = self.image_processor.postprocess(torch.cat(samples), output_type=output_type)
        self.maybe_free_model_hooks()
        return RQPipelineOutput(images=images, codes=codes) if return_dict else (images, codes)

    def _encode_conditions(self, prompt, class_labels, negative_prompt):
        """Prompts or labels as a list, their ids `(P, L)`, the negative prompts' ids; `None` for what there is not."""
        if class_labels is not None:
            labels = [class_labels] if isinstance(class_labels, int) else class_labels
            return labels, torch.tensor(labels)[:, None], None
        if prompt is None:
            return None, None, None
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if negative_prompt is None:
            return prompts, self.encode_prompt(prompts), None
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt must be one, or one per prompt ({len(prompts)}), got {len(negatives)}")
        return prompts, self.encode_prompt(prompts), self.encode_prompt(negatives)

    @staticmethod
    def _score(scorer, images, conditions) -> torch.Tensor:
        scores = scorer(images, conditions)
        if not torch.is_tensor(scores) or scores.shape != (len(images),) or scores.isnan().any():
            raise ValueError(f"scorer must return a number for each of {len(images)} pictures, got {scores}")
        return scores.cpu()

    def compile(self) -> None:
        """
        Makes drawing and decoding several times faster on the device where the pipeline computes; codes stay the
        same, in low precision up to rounding, which may tip one.

        On a CPU by [`RQTransformerModel.pack_weights`], after which the pipeline is neither moved nor cast, and by
        decoding one picture after the other; elsewhere by [`RQTransformerModel.compile_steps`], which takes minutes in
        the first call with every number of images. For the pictures see [`RQVAEModel.fuse_blocks`].
        """
        if self._execution_device.type == "cpu":
            self.transformer.pack_weights()
            self.vae.enable_slicing()
        else:
            self.transformer.compile_steps()
        self.vae.fuse_blocks()

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
        self,
        codes: torch.Tensor,
        depth: int | None = None,
        num_positions: int | None = None,
        output_type: str = "pil",
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Codes `(B, H, W, D)` -> pictures; with `depth=d` from the first d codes of every position, and with
        `num_positions=n` of the first n positions only (see [`RQVAEModel.decode_codes`])."""
        sample = self.vae.decode_codes(codes, depth, num_positions).sample
        return self.image_processor.postprocess(sample.float(), output_type=output_type)

    def reconstruct(
        self, image: PipelineImageInput, depth: int | None = None, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Pictures through the code map and back; with `depth=d` from the first d codes of every position."""
        return self.decode_codes(self.encode_image(image), depth=depth, output_type=output_type)
