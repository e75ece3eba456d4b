"""Prompts and class labels as condition ids, with all their checks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_int64, check_range, check_size, is_integer
from ..models import RQTransformerConfig
from ..text import encode_captions

ClassLabels = int | Sequence[int] | np.ndarray | torch.Tensor


@dataclass
class Conditions:
    """
    Conditions of P images; all but their number is `None` for an unconditional model.

    Args:
        count: P.
        values: the prompts or labels; `None` where condition ids were given instead.
        cond_ids: their ids `(P, L)`, int64.
        negative_cond_ids: those of the negative prompts `(P, L)`, int64, or `None`.
    """

    count: int
    values: list[str] | list[int] | None = None
    cond_ids: torch.Tensor | None = None
    negative_cond_ids: torch.Tensor | None = None

    def repeat(self, times: int) -> "Conditions":
        """Every condition `times` in a row."""
        values = None if self.values is None else [value for value in self.values for _ in range(times)]
        ids = (
            None if x is None else x.repeat_interleave(times, dim=0) for x in (self.cond_ids, self.negative_cond_ids)
        )
        return Conditions(self.count * times, values, *ids)


def is_text_conditional(config: RQTransformerConfig) -> bool:
    return config.cond_length > 1


def is_class_conditional(config: RQTransformerConfig) -> bool:
    return not is_text_conditional(config) and config.cond_vocab_size > 1


def check_conditions(
    config: RQTransformerConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    class_labels: ClassLabels | None = None,
    cond_ids: torch.Tensor | None = None,
    negative_cond_ids: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> None:
    """Raises `ValueError`/`TypeError` for conditions that contradict each other or do not fit the model."""
    given = {"prompt": prompt, "class_labels": class_labels, "cond_ids": cond_ids, "batch_size": batch_size}
    given = [name for name, value in given.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give either {' or '.join(given)}, not both")
    if negative_prompt is not None and prompt is None:
        raise ValueError(f"negative_prompt goes with a prompt, got {negative_prompt=} alone")
    if negative_cond_ids is not None and cond_ids is None:
        raise ValueError("negative_cond_ids go with cond_ids, got negative_cond_ids alone")
    if cond_ids is not None:
        check_cond_ids(config, cond_ids, negative_cond_ids)
    elif is_text_conditional(config):
        if prompt is None:
            raise ValueError("this model needs a prompt")
        if tokenizer is None:
            raise ValueError("this pipeline has no tokenizer, which a prompt needs: pass tokenizer= when loading it")
        check_prompts("prompt", prompt)
        if negative_prompt is not None:
            check_prompts("negative_prompt", negative_prompt)
            num_prompts, num_negatives = (len(as_list(texts)) for texts in (prompt, negative_prompt))
            if not isinstance(negative_prompt, str) and num_negatives != num_prompts:
                raise ValueError(
                    f"negative_prompt must be one, or one per prompt ({num_prompts}), got {num_negatives}"
                )
    elif prompt is not None:
        kind = "class_labels" if is_class_conditional(config) else "neither a prompt nor class_labels"
        raise ValueError(f"this model takes {kind}, got prompt={prompt!r}")
    elif is_class_conditional(config):
        if class_labels is None:
            raise ValueError("this model needs class_labels")
        check_class_labels(class_labels, config)
    elif class_labels is not None:
        raise ValueError(f"this model takes neither a prompt nor class_labels, got class_labels={class_labels!r}")
    elif batch_size is not None:
        check_size("batch_size", batch_size)


def check_cond_ids(
    config: RQTransformerConfig, cond_ids: torch.Tensor, negative_cond_ids: torch.Tensor | None
) -> None:
    if config.cond_vocab_size == 1:
        raise ValueError("this model takes neither a prompt nor class_labels, got cond_ids")
    for name, ids in (("cond_ids", cond_ids), ("negative_cond_ids", negative_cond_ids)):
        if ids is None:
            continue
        check_int64(name, ids, "P", config.cond_length)
        if len(ids) != len(cond_ids):
            raise ValueError(f"{name} must be one per condition ({len(cond_ids)}), got {len(ids)}")
        check_range(name, ids, config.cond_vocab_size)


def check_prompts(name: str, prompts: str | list[str]) -> None:
    texts = as_list(prompts)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, got {prompts!r}")


def label_list(class_labels: ClassLabels) -> list[int]:
    """A label, or a sequence, array or tensor of labels, as a list. Raises `TypeError` for anything else."""
    labels = class_labels.tolist() if isinstance(class_labels, np.ndarray | torch.Tensor) else class_labels
    labels = list(labels) if isinstance(labels, list | tuple) else [labels]
    labels = [x.item() if isinstance(x, torch.Tensor) and x.ndim == 0 else x for x in labels]
    if not labels or not all(is_integer(label) for label in labels):
        raise TypeError(
            "class_labels must be an integer, or a list, tuple, one-dimensional array or tensor of integers, "
            f"got {class_labels!r}"
        )
    return [int(label) for label in labels]


def check_class_labels(class_labels: ClassLabels, config: RQTransformerConfig) -> None:
    labels = label_list(class_labels)
    invalid = [x for x in labels if not 0 <= x < config.cond_vocab_size or x == config.null_cond_id]
    if invalid:
        num_classes = config.cond_vocab_size - (config.null_cond_id is not None)
        raise ValueError(f"class_labels must lie in [0, {num_classes}), got {invalid}")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> torch.Tensor:
    """Prompts -> condition ids `(P, L)`, L = `length`. Raises `ValueError` for a prompt of more than L tokens."""
    cond_ids, num_tokens = encode_captions(tokenizer, prompts, length)
    for text, count in zip(prompts, num_tokens):
        if count > length:
            raise ValueError(f"a prompt may have at most {length} tokens, got {count} for {text!r}")
    return cond_ids


def encode_conditions(
    config: RQTransformerConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    class_labels: ClassLabels | None = None,
    cond_ids: torch.Tensor | None = None,
    negative_cond_ids: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> Conditions:
    """The conditions of arguments that [`check_conditions`] accepts."""
    if cond_ids is not None:
        return Conditions(len(cond_ids), None, cond_ids, negative_cond_ids)
    if class_labels is not None:
        labels = label_list(class_labels)
        return Conditions(len(labels), labels, torch.tensor(labels)[:, None])
    if prompt is None:
        return Conditions(1 if batch_size is None else int(batch_size))
    prompts, negative_ids = as_list(prompt), None
    if negative_prompt is not None:
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        negative_ids = encode_prompts(tokenizer, negatives, config.cond_length)
    return Conditions(len(prompts), prompts, encode_prompts(tokenizer, prompts, config.cond_length), negative_ids)


def as_list(value):
    """A single prompt as a list of one; anything else as it is."""
    return [value] if isinstance(value, str) else value
