"""What the pipelines of both methods share: loading, and the conditions of their transformer."""

import os
from typing import Self

import torch

from ..models.pretrained import reading
from .conditions import as_list, check_prompts, encode_prompts, is_class_conditional, is_text_conditional


class ConditionalPipelineMixin:
    """For a [`~diffusers.DiffusionPipeline`] with the components `transformer`, whose config has `cond_vocab_size` and
    `cond_length`, and `tokenizer`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """As in diffusers, except that a name that is neither a folder nor possible on the Hub is a
        `FileNotFoundError`, and files that are not JSON a `ValueError`."""
        with reading("a pipeline", pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def is_text_conditional(self) -> bool:
        self._require("transformer")
        return is_text_conditional(self.transformer.config)

    @property
    def is_class_conditional(self) -> bool:
        self._require("transformer")
        return is_class_conditional(self.transformer.config)

    def _require(self, name: str) -> None:
        """Raises `ValueError` when the pipeline was made without this component."""
        if getattr(self, name) is None:
            raise ValueError(f"this pipeline has no {name}, which this call needs: pass {name}= when loading it")

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present or last call, by `pipe._interrupt = True`."""
        return self._interrupt

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """Prompts -> condition ids `(B, L)`, padded on the right. Without the transformer, L is the
        `model_max_length` of the tokenizer.

        Raises `ValueError` for a prompt of more than L tokens: prompts are never truncated silently.
        """
        self._require("tokenizer")
        check_prompts("prompt", prompt)
        length = self.transformer.config.cond_length if self.transformer else self.tokenizer.model_max_length
        return encode_prompts(self.tokenizer, as_list(prompt), length)

    @property
    def task(self) -> str:
        """The task of the Hub."""
        return "text-to-image" if self.is_text_conditional else "unconditional-image-generation"

    @property
    def example_call(self) -> str:
        """A Python expression that samples from `pipe`, for model cards."""
        if self.is_text_conditional:
            return 'pipe("red apple")'
        return "pipe(class_labels=0)" if self.is_class_conditional else "pipe(batch_size=4)"
