"""Checks of single arguments, which say what was got and what is accepted."""

import math
import os
from collections.abc import Sequence
from numbers import Integral
from types import UnionType

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

RANGES = {
    "be at least 0": lambda number: number >= 0,
    "be at least 1": lambda number: number >= 1,
    "be at least 2": lambda number: number >= 2,
    "be greater than 0": lambda number: number > 0,
    "be finite": lambda number: True,
    "lie in [0, 1)": lambda number: 0 <= number < 1,
    "lie in [0, 1]": lambda number: 0 <= number <= 1,
    "lie in (0, 1]": lambda number: 0 < number <= 1,
}
LARGEST_SIZE = 2**31 - 1
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 1e20


def is_integer(value) -> bool:
    """Whether `value` is an integer of Python or NumPy; a boolean is not one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether `value` is a real number of Python or NumPy; a boolean is not one."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_integer(name: str, value: int, lowest: int, highest: int) -> None:
    """Raises `TypeError` unless `value` is an integer (of Python or NumPy), `ValueError` outside of the bounds."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must lie in [{lowest}, {highest}], got {value}")


def check_size(name: str, value: int) -> None:
    """Raises `TypeError` unless `value` is an integer (of Python or NumPy), `ValueError` below 1 and from 2³¹ on."""
    if is_integer(value) and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    check_integer(name, value, 1, LARGEST_SIZE)


def check_number(name: str, value: float, requirement: str) -> None:
    """Raises `TypeError` unless `value` is a number (of Python or NumPy), `ValueError` if it is NaN, infinite or out
    of range; `requirement` is one of [`RANGES`]."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    if not RANGES[requirement](value):
        raise ValueError(f"{name} must {requirement}, got {value}")
    if not abs(value) < math.inf:
        finite = "" if requirement == "be finite" else " and be finite"
        raise ValueError(f"{name} must {requirement}{finite}, got {value}")


def check_temperature(name: str, value: float) -> None:
    """Raises `TypeError` unless `value` is a number, `ValueError` unless it is greater than 0, and so far from 0 and
    infinity that float32 can divide by it."""
    check_number(name, value, "be greater than 0")
    if not SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        raise ValueError(f"{name} must lie in [{SMALLEST_TEMPERATURE}, {LARGEST_TEMPERATURE}], got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raises `TypeError` for anything but `True` and `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises `ValueError` unless `value` is one of the `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r:.80}")


def check_instance(name: str, value, accepted: type | UnionType) -> None:
    """Raises `TypeError` unless `value` is an instance of the class, or of one of the classes."""
    if not isinstance(value, accepted):
        kind = accepted if isinstance(accepted, UnionType) else accepted.__name__
        raise TypeError(f"{name} must be of type {kind}, got {value!r:.80}")


def check_source(name: str, source: str | os.PathLike) -> None:
    """Raises `TypeError` unless this is a name, `FileNotFoundError` unless it is a folder or possible on the Hub."""
    check_instance(name, source, str | os.PathLike)
    if os.path.isdir(source):
        return
    try:
        validate_repo_id(os.fspath(source))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name} must be a folder or user/name on the Hub; there is no folder {os.fspath(source)!r}"
        ) from error


def check_items(name: str, values: Sequence, count: int | None = None) -> None:
    """Raises `TypeError` unless `values` is a list or tuple, `ValueError` for another number of items."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list or tuple, got {values!r:.80}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} must have {count} items, got {values!r:.80}")


def check_callable(name: str, value) -> None:
    """Raises `TypeError` unless `value` is a function or the like, or `None`."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r:.80}")


def as_plain(value):
    """Numbers, arrays and tensors, also within lists and tuples, as numbers and lists of Python, which JSON can
    hold; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(as_plain(item) for item in value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def check_floating(name: str, value: torch.Tensor, *shape: int | str) -> None:
    """Raises `TypeError` unless `value` is a tensor of floating-point numbers, `ValueError` unless it has the shape;
    see [`check_shape`]."""
    check_dense(name, value)
    check_shape(name, value, *shape)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def check_int64(name: str, value: torch.Tensor, *shape: int | str) -> None:
    """Raises `TypeError` unless `value` is a tensor of int64, `ValueError` unless it has the shape; see
    [`check_shape`]."""
    check_dense(name, value)
    if value.dtype != torch.long:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    check_shape(name, value, *shape)


def check_range(name: str, ids: torch.Tensor, size: int) -> None:
    """Raises `ValueError` unless all `ids` lie in [0, size). Compiled code cannot look at values."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    check_values(name, ids)
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got values from {lowest} to {highest}")


def check_values(name: str, value: torch.Tensor) -> None:
    """Raises `ValueError` for a tensor on the meta device."""
    if value.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raises `ValueError` for rows `(..., C)` that are NaN or infinite. Compiled code cannot look at values."""
    if torch.compiler.is_compiling() or value.is_meta or not value.numel():
        return
    if all(bound.isfinite() for bound in value.aminmax()):  # NaN, where there is one
        return
    rows = value.isfinite().all(dim=-1)
    raise ValueError(f"{name} must be finite, got NaN or infinite values in {int((~rows).sum())} of {rows.numel()}")


def check_unit_interval(name: str, value: torch.Tensor) -> None:
    """Raises `ValueError` for values outside of [0, 1] and NaN."""
    check_values(name, value)
    lowest, highest = (number.item() for number in value.aminmax())
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got values from {lowest} to {highest}")


def check_dense(name: str, value: torch.Tensor) -> None:
    """Raises `TypeError` unless `value` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {value!r:.80}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")


def check_shape(name: str, value: torch.Tensor, *shape: int | str) -> None:
    """
    Raises `ValueError` for another shape.

    Args:
        shape: the sizes; a name stands for any size of at least 1, and a first `"..."` for any dimensions.
    """
    found, wanted = tuple(value.shape), shape
    if shape[0] == "...":
        found, wanted = found[len(found) - len(shape) + 1 :], shape[1:]
    matches = len(found) == len(wanted) and all(
        isinstance(size, str) or size == own for own, size in zip(found, wanted)
    )
    if not matches or not value.numel():
        text = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        empty = ", not empty" if matches else ""
        raise ValueError(f"{name} must have the shape ({text}){empty}, got {tuple(value.shape)}")
