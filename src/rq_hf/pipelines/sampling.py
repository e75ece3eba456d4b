"""What pipelines do around their model: batches, callbacks after every step, and what they return."""

from collections.abc import Callable, Sequence

import torch

from ..argument_checks import check_callable, check_items

IMAGE_TYPES = ("pil", "np", "pt")
OUTPUT_TYPES = (*IMAGE_TYPES, "latent")


class Interrupted(Exception):
    """Ends `generate` from within its callback."""


def batches(count: int, max_batch_size: int) -> list[slice]:
    """Slices of at most `max_batch_size` that `count` rows are divided into."""
    return [slice(i, min(i + max_batch_size, count)) for i in range(0, count, max_batch_size)]


def take(values, rows: slice):
    """Rows of a tensor or list; `None` for `None`."""
    return None if values is None else values[rows]


def check_callback(callback: Callable | None, tensor_inputs: Sequence[str], accepted: list[str]) -> None:
    """Raises `ValueError`/`TypeError` unless this can be called after every step, with these tensors."""
    check_callable("callback_on_step_end", callback)
    check_items("callback_on_step_end_tensor_inputs", tensor_inputs)
    unknown = [name for name in tensor_inputs if name not in accepted]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {accepted}, got {unknown}")


def returned_tensor(outputs: dict | None, name: str) -> torch.Tensor | None:
    """The tensor `name` in what `callback_on_step_end` returned, if any."""
    if outputs is not None and not (isinstance(outputs, dict) and outputs.keys() <= {name}):
        raise TypeError(f"callback_on_step_end must return None or a dictionary with {name!r}, got {outputs!r:.80}")
    return None if outputs is None else outputs.get(name)


def finite_pixels(sample: torch.Tensor) -> torch.Tensor:
    """What a vae decoded, in float32. Raises `ValueError` where it is NaN or infinite."""
    sample = sample.float()
    if not sample.isfinite().all():
        raise ValueError("the vae gave pixels that are NaN or infinite; in float16, try bfloat16 or float32")
    return sample
